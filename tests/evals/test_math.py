"""Problems, prompts, grades and figures of the math benches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import qa_completion, qa_prompt
from mambacus.evals import math
from mambacus.runtime.errors import UserError

NUMBER = MathProblem(id="1", question="What is 2 + 2?", answer="4", solution="2 + 2 = 4")
CHOICE = MathProblem(id="2", question="Pick three.", answer="B", options=("2", "3", "5"))


def test_the_prompt_is_the_training_prompt() -> None:
    assert math.prompt(NUMBER, "cot") == qa_prompt(NUMBER.question) == "Question: What is 2 + 2?\nAnswer:"
    assert math.prompt(NUMBER, "direct") == "Question: What is 2 + 2?\nAnswer: ####"
    assert qa_completion(None, "4") == " #### 4"  # so direct asks for what a row without a solution teaches
    assert math.prompt(CHOICE, "cot") == qa_prompt(CHOICE.question, CHOICE.options)
    assert math.prompt(CHOICE, "cot") == "Question: Pick three.\nAnswer Choices: (A) 2 (B) 3 (C) 5\nAnswer:"


def test_what_training_teaches_is_graded_right() -> None:
    for problem in math.load_problems("wordproblems", None, 50, 3):
        verdict = math.grade(problem, qa_completion(problem.solution, problem.answer), "cot")
        assert (verdict.correct, verdict.reason, verdict.extracted) == (True, "####", problem.answer)


@pytest.mark.parametrize(
    "name", ["gsm8k", "svamp", "asdiv", "mawps", "gsm_hard", "aqua", "mathqa_gen", "math", "math500"]
)
def test_gold_answers_are_right_by_their_own_grader(name: str, small_data: Path) -> None:
    problems = math.load_problems(name, small_data, None, 0)
    assert len(problems) == 24
    for problem in problems:
        for style, text in (("cot", f" so\n#### {problem.answer}"), ("direct", f" {problem.answer}")):
            assert math.grade(problem, text, style, latex=math.BENCHES[name].latex).correct, (problem, style)
        wrong = "E" if problem.answer == "A" else "A" if problem.options else "12345.678"
        assert not math.grade(problem, f"#### {wrong}", "cot", latex=math.BENCHES[name].latex).correct


def test_a_choice_without_its_letter() -> None:
    assert math.grade(CHOICE, "#### 3", "cot") == math.Grade("B", True, "option text", "B")
    assert math.grade(CHOICE, "#### 2", "cot").correct is False
    assert math.grade(CHOICE, "no idea", "cot") == math.Grade(None, False, "unparsed", None)


def test_equal_problems_from_equal_seeds() -> None:
    assert math.load_problems("wordproblems", None, 20, 1) == math.load_problems("wordproblems", None, 30, 1)[:20]
    assert math.load_problems("wordproblems", None, 20, 1) != math.load_problems("wordproblems", None, 20, 2)


def test_unknown_bench_and_missing_data() -> None:
    with pytest.raises(UserError, match=r"unknown bench 'gsm8'.*did you mean 'gsm8k'"):
        math.load_problems("gsm8", None, None, 0)
    with pytest.raises(UserError, match="--data-dir"):
        math.load_problems("gsm8k", None, None, 0)


def item(name: str, vote: str | None, correct: bool, finish_reason: str = "eos", tokens: int = 5) -> dict[str, Any]:
    answer = {"extracted": vote, "vote": vote, "correct": correct}
    return {"id": name, **answer, "finish_reason": finish_reason, "tokens": tokens}


def test_figures_of_single_answers() -> None:
    items = [item("a", "4", True), item("b", "5", False, "length", 9), item("c", None, False, "stop")]
    figures = math.summarise([*items, item("d", "1", True)])
    assert {key: figures[key] for key in ("n", "correct", "accuracy")} == {"n": 4, "correct": 2, "accuracy": 0.5}
    assert figures["wilson95"] == pytest.approx([0.1500, 0.8500], abs=1e-4)
    assert (figures["parse_rate"], figures["truncation_rate"], figures["eos_rate"]) == (0.75, 0.25, 0.5)
    assert figures["generated_tokens"] == 24
    assert "pass_at" not in figures


def test_figures_of_several_samples() -> None:
    always = [item("a", "4", True)] * 4
    once = [item("b", "7", True), item("b", "1", False), item("b", None, False), item("b", "1", False)]
    figures = math.summarise([*always, *once])
    assert (figures["n"], figures["samples"], figures["correct"]) == (2, 4, 5)
    assert figures["accuracy"] == pytest.approx(5 / 8)
    assert figures["pass_at"] == pytest.approx({1: 0.625, 2: 0.75, 4: 1.0})
    assert figures["maj_at"][4] == pytest.approx(0.5)  # two votes for 1 beat the one for 7
    assert figures["maj_at"][1] == pytest.approx(0.625, abs=0.1)
    assert figures == math.summarise([*always, *once])


def test_a_majority_is_right_in_any_order_or_in_none() -> None:
    problem = MathProblem(id="a", question="What share?", answer="0.5")
    samples = []
    for completion in ("#### 50", "#### 50", "#### 50%"):
        verdict = math.grade(problem, completion, "cot")
        samples.append(item("a", completion, verdict.correct) | {"vote": verdict.vote})
    assert [sample["correct"] for sample in samples] == [False, False, True]
    for order in (samples, samples[::-1]):
        assert math.summarise(order)["maj_at"][3] == 0.0
    mixed = [item("a", "x", True), item("a", "x", False), item("a", "x", True)]
    assert math.summarise(mixed)["maj_at"][3] == math.summarise(mixed[::2] + mixed[1:2])["maj_at"][3] == 0.0


def test_the_problem_type_is_the_data_folders() -> None:
    assert {field.name for field in dataclasses.fields(MathProblem)} >= {"id", "question", "answer", "options"}


def test_parts_of_math(small_data: Path) -> None:
    problems = math.load_problems("math", small_data, None, 0)
    assert problems[0].parts == {"subject": "Algebra", "level": "3"}  # type: ignore[attr-defined]
    assert problems[0].group == "Algebra"
    assert {problem.parts["level"] for problem in math.load_problems("math500", small_data, None, 0)} <= set("12345")  # type: ignore[attr-defined]
    items = [
        item(f"{subject}{n}", "1", right) | {"parts": {"subject": subject, "level": str(n)}, "error": None}
        for subject, rights in (("Algebra", (True, True)), ("Geometry", (False, True)), ("Counting", (False, False)))
        for n, right in enumerate(rights)
    ]
    figures = math.summarise(items)
    assert figures["parts"]["subject"]["Geometry"]["accuracy"] == 0.5
    assert figures["parts"]["level"]["1"]["n"] == 3
    low, high = figures["clustered95"]
    assert low < figures["wilson95"][0] and high > figures["wilson95"][1]  # three subjects say little


def test_worked_examples_are_training_texts(small_data: Path) -> None:
    text = math.examples("svamp", "cot", small_data, 2)
    assert text.startswith("Question: Natalia sold clips") and text.count("\n#### ") == 2
    assert text.endswith("\n\n")
    direct = math.examples("aqua", "direct", small_data, 3)
    assert direct.count("\nAnswer: #### ") == direct.count("Answer Choices: (A)") == 3
    assert math.examples("gsm8k", "cot", small_data, 0) == ""
    with pytest.raises(UserError, match="--num-fewshot 30: gsm8k has 24 worked examples"):
        math.examples("gsm8k", "cot", small_data, 30)


def test_the_packaged_programs_are_right() -> None:
    from mambacus.evals.answers import same_number
    from mambacus.evals.exemplars import PROGRAMS, program_examples
    from mambacus.evals.sandbox import run_programs

    outcomes = run_programs([program for _, program, _ in PROGRAMS])
    for (_, _, answer), outcome in zip(PROGRAMS, outcomes, strict=True):
        assert outcome.answer is not None and same_number(answer, outcome.answer)
    assert program_examples(4).count("```python\n") == 4
    with pytest.raises(UserError, match="at most 4"):
        program_examples(5)


def test_programs_are_graded_by_what_they_answer() -> None:
    from mambacus.evals.sandbox import Outcome

    def graded(problem: MathProblem, status: str, detail: str, answer: str | None) -> math.Grade:
        return math.grade(problem, "", "program", outcome=Outcome(status, detail, answer))

    assert graded(NUMBER, "ok", "", "Total: 4 pens") == math.Grade("4", True, "program: ok", "4")
    assert graded(NUMBER, "ok", "", "5.0") == math.Grade("5.0", False, "program: ok", "5")
    assert graded(NUMBER, "ok", "", None) == math.Grade(None, False, "program: no answer", None)
    assert graded(NUMBER, "forbidden", "open x", None).reason == "program: forbidden (open x)"
    assert graded(CHOICE, "ok", "", "3").correct and graded(CHOICE, "ok", "", "B").correct
