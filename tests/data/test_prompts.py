"""The prompt format, byte by byte."""

from __future__ import annotations

import pytest

from mambacus.data.prompts import qa_completion, qa_prompt


def test_prompt_is_exact() -> None:
    assert qa_prompt("  How many?\n") == "Question: How many?\nAnswer:"
    assert qa_prompt("Pick three. ", ["2", "3"]) == "Question: Pick three.\nAnswer Choices: (A) 2 (B) 3\nAnswer:"
    with pytest.raises(ValueError, match="zip"):
        qa_prompt("q", ["x"] * 11)


@pytest.mark.parametrize(
    ("solution", "answer", "expected"),
    [
        ("2 + 3 = 5", "5", " 2 + 3 = 5\n#### 5"),
        ("2 + 3 = 5\n#### 5", "5", " 2 + 3 = 5\n#### 5"),
        ("2 + 3 = 5\n#### 5\n", "5", " 2 + 3 = 5\n#### 5"),
        (None, "5", " #### 5"),
        ("  ", " 5 ", " #### 5"),
        ("#### is a mark\nso 5", "5", " #### is a mark\nso 5\n#### 5"),
    ],
)
def test_completion_ends_in_one_answer_line(solution: str | None, answer: str, expected: str) -> None:
    assert qa_completion(solution, answer) == expected
