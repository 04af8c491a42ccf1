"""Properties of the generated problems, read from their text alone wherever that is possible."""

from __future__ import annotations

import operator
import random
import re
import subprocess
import sys

import pytest

from mambacus.data import wordproblems
from mambacus.data.lexicon import Noun, counted, draw_people, plural
from mambacus.data.templates import MAX_RESULT, Step, Template, load_templates
from mambacus.data.wordproblems import WordProblem, by_steps, generate
from mambacus.runtime.errors import UserError

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+) (?P<unit>[a-z ]+)")


@pytest.fixture(scope="module", params=wordproblems.SPLITS)
def problems(request: pytest.FixtureRequest) -> list[WordProblem]:
    return generate(3000, request.param, seed=3)


def test_equations_are_right_and_lead_to_the_answer(problems: list[WordProblem]) -> None:
    for problem in problems:
        assert problem.solution is not None
        *lines, last = problem.solution.split("\n")
        results: list[int] = []
        unused: set[int] = set()
        for line in lines:
            match = LINE.fullmatch(line)
            assert match, line
            left, op, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
            assert OPERATIONS[op](left, right) == result, line
            assert op != "/" or left % right == 0, line
            assert 1 <= result <= MAX_RESULT, line
            unused -= {left, right}
            results.append(result)
            unused.add(result)
        assert unused == {results[-1]}, f"a step leads nowhere: {problem.solution}"
        assert last == f"#### {results[-1]}"
        assert problem.answer == str(results[-1])
        assert len(lines) == problem.steps


def test_every_number_is_used_or_a_declared_distractor(problems: list[WordProblem]) -> None:
    templates = {template.key: template for split in wordproblems.SPLITS for template in load_templates(split)}
    for problem in problems:
        assert problem.solution is not None
        stated = [int(number) for number in re.findall(r"\d+", problem.question)]
        for number in problem.distractors:
            stated.remove(number)
        operands: set[str] = set()
        results: set[str] = set()
        for line in problem.solution.split("\n")[:-1]:
            left, right, result = re.findall(r"\d+", line)
            operands |= {left, right} - results
            results.add(result)
        steps = templates[problem.template].steps
        literals = {name for step in steps for name in (step.left, step.right) if name.isdecimal()}  # told in words
        assert {str(n) for n in stated} <= operands | results, problem
        assert operands <= {str(n) for n in stated} | literals, problem


def test_text_is_finished(problems: list[WordProblem]) -> None:
    for problem in problems:
        assert not re.search(r"[{}\[\]|]|  ", problem.question), problem.question
        assert problem.question.endswith("?")
        assert not re.search(r"\b1 [a-z]+s\b", problem.solution or ""), problem.solution
        assert not re.search(r"(?<!\d)[01] ", problem.question), problem.question


def test_questions_differ_within_and_across_splits() -> None:
    train, test = generate(8000, "train"), generate(1500, "test")
    questions = {problem.question for problem in train}
    assert len(questions) == 8000
    assert len({problem.question for problem in test}) == 1500
    assert not questions & {problem.question for problem in test}
    assert len({problem.id for problem in train + test}) == 9500


def test_longer_list_starts_with_the_shorter() -> None:
    assert generate(20, "test", seed=5) == generate(40, "test", seed=5)[:20]
    assert generate(20, "test", seed=5) != generate(20, "test", seed=6)


def test_equal_in_another_process() -> None:
    code = "from mambacus.data.wordproblems import generate; print([p.question for p in generate(50, 'train', 7)])"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env={"PYTHONHASHSEED": "123"}, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([problem.question for problem in generate(50, "train", 7)])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_select(steps: int) -> None:
    assert {problem.steps for problem in generate(50, "test", steps=steps)} == {steps}


def test_row_has_the_keys_of_the_training_files() -> None:
    row = generate(1)[0].row()
    assert {"id", "question", "answer", "solution", "source"} <= set(row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n": 1, "split": "tset"},
            "split must be one of train, test, reworded, novel, got 'tset'; did you mean 'test'",
        ),
        ({"n": 1, "steps": 5}, "steps must be 1, 2, 3 or 4, got 5"),
        ({"n": -1}, ">= 0, got -1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        generate(**arguments)  # type: ignore[arg-type]


def test_more_than_the_templates_can_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (template,) = (t for t in load_templates("train") if t.key == "weeks")
    monkeypatch.setattr(wordproblems, "by_steps", lambda split: {count: [template] for count in (1, 2, 3, 4)})
    monkeypatch.setattr(wordproblems, "DISTRACTOR_RATE", 0.0)
    monkeypatch.setattr(wordproblems, "MAX_REPEATS", 2)
    with pytest.raises(UserError, match="different problems"):
        generate(50_000)


# Templates


def _sentences(template: Template) -> set[str]:
    texts = f"{template.story} {template.ask}"
    return {sentence.strip() for sentence in re.split(r"(?<=[.?])\s", re.sub(r"\{\w", "{", texts))}


def _plan(template: Template) -> tuple[tuple[str, str, str], ...]:
    """Operations with their operands' kinds: a number of the text, the result of step k, a literal."""
    places = {step.result: f"r{index}" for index, step in enumerate(template.steps)}

    def kind(name: str) -> str:
        return places.get(name, name if name.isdecimal() else "n")

    return tuple((kind(step.left), step.op, kind(step.right)) for step in template.steps)


def test_enough_templates() -> None:
    assert sum(map(len, by_steps("train").values())) >= 400
    assert sum(map(len, by_steps("test").values())) >= 50
    assert all(len(group) >= 8 for split in wordproblems.SPLITS for group in by_steps(split).values())


def test_splits_share_no_sentence() -> None:
    train = set().union(*map(_sentences, load_templates("train")))
    for name in wordproblems.SPLITS[1:]:
        assert not train & set().union(*map(_sentences, load_templates(name)))
    assert not set(wordproblems.DISTRACTORS["train"]) & set(wordproblems.DISTRACTORS["test"])


def test_heldout_plans_occur_in_training() -> None:
    train = {_plan(t) for t in load_templates("train")}
    assert {_plan(t) for name in wordproblems.SPLITS[1:] for t in load_templates(name)} <= train


@pytest.mark.parametrize("split", wordproblems.SPLITS)
def test_templates_are_sound(split: str) -> None:
    templates = load_templates(split)
    assert len({template.key for template in templates}) == len(templates)
    for template in templates:
        text = f"{template.story} {template.ask}"
        for number in template.numbers:
            assert f"{{{number}}}" in text, f"{template.key}: number {number} is not in the text"
        operands = {name for step in template.steps for name in (step.left, step.right)}
        assert set(template.numbers) <= operands, f"{template.key}: a number is not used"
        results = [step.result for step in template.steps]
        names = [*template.numbers, *template.nouns, *results]
        assert len(set(names)) == len(names), f"{template.key}: a name stands for two things"
        assert set(results[:-1]) <= operands, f"{template.key}: a step leads nowhere"


def test_contradicting_template_is_refused() -> None:
    template = Template("bad", "{x}", "?", (Step.parse("x - x = t apple"),), {"x": (2, 9)}, {})
    with pytest.raises(RuntimeError, match="bad"):
        template.draw_numbers(random.Random(0))


def test_step_needs_its_form() -> None:
    with pytest.raises(ValueError, match="not a step"):
        Step.parse("x - y")


# Grammar


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("apple", "apples"), ("box", "boxes"), ("brush", "brushes"), ("cherry", "cherries"), ("key", "keys"),
        ("loaf", "loaves"), ("toy car", "toy cars"), ("cup of flour", "cups of flour"), ("sheep", "sheep"),
        ("person", "people"), ("egg roll", "egg rolls"),
    ],
)  # fmt: skip
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


def test_noun_forms() -> None:
    assert counted(1, "box") == "1 box"
    assert counted(2, "box") == "2 boxes"
    assert (Noun("apple").a, Noun("kite").a) == ("an apple", "a kite")


def test_people_have_different_names_and_fitting_pronouns() -> None:
    people = draw_people(random.Random(1), 40)
    assert len({person.name for person in people}) == 40
    assert all((person.he, person.his) in {("he", "his"), ("she", "her")} for person in people)
    assert people[0].He == people[0].he.capitalize()
