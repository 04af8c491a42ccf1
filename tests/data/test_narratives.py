"""Pre-training stories: right sums, finished sentences, and nothing of the problems they must not give away."""

from __future__ import annotations

import operator
import random
import re

import pytest

from mambacus.data.corpus import FORBIDDEN
from mambacus.data.narratives import narrative, phrases, scenes
from mambacus.data.templates import load_templates
from mambacus.data.wordproblems import DISTRACTORS, generate

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.fixture(scope="module")
def stories() -> list[str]:
    rng = random.Random(11)
    return [narrative(rng) for _ in range(12_000)]


def test_every_equation_is_right(stories: list[str]) -> None:
    found = 0
    for story in stories:
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", story):
            assert OPERATIONS[sign](int(left), int(right)) == int(result), story
            found += 1
    assert found > 10_000


def test_outcome_is_the_last_result(stories: list[str]) -> None:
    checked = 0
    for story in stories:
        results = re.findall(r"= (\d+)", story)
        if results:
            last = story.rsplit("= ", 1)[1]
            assert results[-1] in re.findall(r"\d+", last), story
            checked += 1
    assert checked > 8_000


def test_stories_are_finished_text(stories: list[str]) -> None:
    for story in stories:
        assert not re.search(r"[{}\[\]|?]|  ", story), story
        assert story.endswith("."), story
    assert len(set(stories)) > 0.99 * len(stories)


def test_nothing_of_the_question_answer_format(stories: list[str]) -> None:
    for story in stories:
        assert not any(mark in story for mark in (*FORBIDDEN, "How many", "What is", "?")), story


def test_same_seed_same_story() -> None:
    first, second = random.Random(4), random.Random(4)
    assert [narrative(first) for _ in range(50)] == [narrative(second) for _ in range(50)]


# Wordings, compared with numbers, people and nouns masked


def _masked(text: str) -> list[list[str]]:
    """Return the words of each sentence."""
    kinds = dict.fromkeys("ABC", "<person>") | dict.fromkeys("ijucq", "<noun>")
    text = re.sub(r"\{(\w)[^}]*\}", lambda match: f" {kinds.get(match[1], '<number>')} ", text)
    return [re.findall(r"<\w+>|[\w']+", sentence) for sentence in re.split(r"[.?!]", text.lower())]


def _runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    sentences = [words for text in texts for words in _masked(text)]
    return {tuple(words[at : at + length]) for words in sentences for at in range(len(words) - length + 1)}


def _told(name: str) -> list[str]:
    return [f"{t.story} {t.ask} {t.goal} {t.close}" for t in load_templates(name)]


@pytest.mark.parametrize("name", ["narratives", "phrases", "train"])
def test_no_seven_words_in_a_row_are_those_of_a_heldout_problem(name: str) -> None:
    texts = [line for lines in phrases().values() for line in lines] if name == "phrases" else _told(name)
    heldout = [*_told("reworded"), *_told("novel"), *DISTRACTORS["test"]]
    assert not _runs(texts, 7) & _runs(heldout, 7)


def test_the_comparison_would_notice() -> None:
    assert _runs(_told("novel")[:1], 7) & _runs([_told("novel")[0].replace("{x}", "{y}")], 7)


def test_no_sentence_of_a_problem_is_told(stories: list[str]) -> None:
    def sentences(text: str) -> set[str]:
        text = re.sub(r"\b[A-Z][a-z]+\b(?='s)|(?<!^)(?<![.?] )\b[A-Z][a-z]+\b|\d+", "#", text)
        return {part for part in re.split(r"(?<=[.?])\s", text) if len(part.split()) > 7}

    problems = set().union(*(sentences(p.question) for split in ("reworded", "novel") for p in generate(2_000, split)))
    assert not problems & set().union(*map(sentences, stories))


def test_scenes_are_sound() -> None:
    told = scenes()
    assert len(told) >= 500
    assert len({scene.key for scene in told}) == len(told)
    for scene in told:
        operands = {name for step in scene.steps for name in (step.left, step.right)}
        assert set(scene.numbers) <= operands, scene.key
        names = [*scene.numbers, *scene.nouns, *(step.result for step in scene.steps)]
        assert len(set(names)) == len(names), scene.key
