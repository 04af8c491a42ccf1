"""The grader against its table, see `grader_table`."""

from __future__ import annotations

from pathlib import Path

import pytest
from grader_table import LETTERS, NUMBERS, OPTIONS, lm_eval_verdicts

from mambacus.evals.answers import canonical, extract_letter, extract_number, first_answer, same_number
from mambacus.evals.expressions import same_expression


@pytest.mark.parametrize(("completion", "gold", "extracted", "reason", "correct"), NUMBERS)
def test_number_table(completion: str, gold: str, extracted: str | None, reason: str, correct: bool) -> None:
    found = extract_number(completion)
    assert (found.text, found.reason) == (extracted, reason)
    assert (found.text is not None and same_number(gold, found.text)) is correct


@pytest.mark.parametrize(("completion", "letter", "reason"), LETTERS)
def test_letter_table(completion: str, letter: str | None, reason: str) -> None:
    found = extract_letter(completion, OPTIONS)
    assert (found.text, found.reason) == (letter, reason)


def test_the_table_is_large_and_has_every_rule() -> None:
    assert len(NUMBERS) >= 150 and len(LETTERS) >= 30
    assert {row[3] for row in NUMBERS} == {"####", "boxed", "answer is", "last number", "unparsed"}


def test_first_answer_keeps_text_without_a_new_question() -> None:
    assert first_answer("The question was hard. 5") == "The question was hard. 5"


def test_degenerate_completions_cost_nothing_and_earn_nothing() -> None:
    endless = "#### " + "9" * 6000
    found = extract_number(endless)
    assert found.text == "9" * 6000
    assert not same_number("9", found.text)
    assert extract_number("1," * 20_000).reason == "last number"
    assert extract_number("-" * 20_000).reason == "unparsed"


def test_canonical_counts_equal_numbers_as_one_vote() -> None:
    assert {canonical(text) for text in ("29", "29.00", "$29", "29.", "58/2")} == {"29"}
    assert canonical("3 1/2") == canonical("3.5") == "7/2"
    assert canonical("-3") != canonical("3")
    assert canonical(r"\frac{1}{2}") == r"\frac{1}{2}"


def test_lm_evals_filters_are_shown_as_they_are() -> None:
    assert lm_eval_verdicts("#### 29.00", "29") == ("29.00", "29.00")  # not equal as text
    assert lm_eval_verdicts("#### $1,234", "1234") == ("[invalid]", "$1,234 ✓")
    assert lm_eval_verdicts("#### 7\n\nQuestion: 8\n#### 9", "7") == ("7 ✓", "9")


def test_the_printed_table_is_the_tables() -> None:
    page = Path(__file__).parents[2] / "docs" / "grading.md"
    assert page.read_text(encoding="utf-8").count("\n| ") == len(NUMBERS) + 1


def test_numbers_that_grading_tells_apart_are_different_votes() -> None:
    assert canonical("50%") == canonical("50 percent") != canonical("50")
    assert canonical("3k") != canonical("3000") and canonical("25 cents") != canonical("25")
    assert canonical("5 hours 30 minutes") != canonical("5.5")


def test_huge_powers_are_refused_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    monkeypatch.setattr(math_verify, "parse", lambda *_, **__: pytest.fail("parsed"))
    for text in ("2^999999999", "10^{10^{10}}", "9^{9^{9^{9}}}", "3 × 10^999999999", "10^10^10", "999999999!"):
        assert not same_number("5", text)
        assert not same_expression("5", text)
