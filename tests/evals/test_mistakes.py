"""Equations in worked answers, computed again, and the kind of error they speak for."""

from __future__ import annotations

import time

import pytest

from mambacus.data import wordproblems
from mambacus.evals.mistakes import (
    ARITHMETIC,
    CATEGORIES,
    CUT_OFF,
    NO_ANSWER,
    SET_UP,
    UNCHECKED,
    equations,
    error_category,
)

EQUATIONS = [
    ("He has 3 + 4 = 7 apples and 2 more.", [True]),
    ("3 apples + 4 apples = 8 apples", [False]),
    ("2 + 3 = 5 * 2 = 10", [True, True]),  # as people write on
    ("2 + 3 = 6 * 2 = 12", [False, True]),
    ("48/2 = <<48/2=24>>24 clips", [True]),
    ("He pays $5 x 3 = $15.", [True]),
    ("20% of 50 = 10", [True]),
    ("100 * 5% = 5", [True]),
    ("50 / 100 = 50%", [True]),
    ("10/3 = 3.33", [True]),
    ("10/3 = 3.34", [True]),  # within one unit of the last decimal
    ("10/3 = 3.4", [True]),
    ("10/3 = 3.5", [False]),
    ("10/3 = 3", [False]),
    ("(2 + 3) * 4 = 20", [True]),
    ("So (2 + 3 = 5).", [True]),
    ("1,000 - 1 = 999", [True]),
    ("1/2 + 1/4 = 3/4", [True]),
    ("-3 + 5 = 2", [True]),
    ("5 − 8 = −3", [True]),
    ("6 ÷ 2 × 3 = 9", [True]),
    ("12 hours x 2 = 24 hours", [True]),
    ("007 + 1 = 8", [True]),
    ("3 + 4 = 7\n7 - 9 = 2", [True, False]),
    ("$3 + $4 = $7.50", [False]),
    ("x + 3 = 5", []),
    ("2x = 4", []),
    ("f(3) = 9", []),
    ("3^2 + 1 = 10", []),
    ("1/0 = 5", []),
    ("7 = 7", []),
    ("no numbers", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "right"), EQUATIONS)
def test_equations(text: str, right: list[bool]) -> None:
    assert [equation.right for equation in equations(text)] == right


def test_generated_solutions_hold() -> None:
    found = [
        equation for problem in wordproblems.generate(60, "test", 1) for equation in equations(problem.solution or "")
    ]
    assert len(found) > 60
    assert all(equation.right for equation in found), [equation for equation in found if not equation.right]


def test_long_and_odd_texts_cost_nothing() -> None:
    start = time.process_time()
    for text in ("1 + " * 5000, "(" * 3000 + "1 + 1 = 2", "9" * 5000 + " + 1 = 2", "1 = " * 3000, "a 1 b 2 " * 3000):
        equations(text)
    assert equations("((((1 + 1 = 2")[0].right
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "parsed", "finish_reason", "category"),
    [
        ("3 + 4 = 8\n#### 8", True, "eos", ARITHMETIC),
        ("3 + 4 = 7\n#### 7", True, "eos", SET_UP),
        ("#### 7", True, "eos", UNCHECKED),
        ("I do not know", False, "eos", NO_ANSWER),
        ("and and and", False, "length", CUT_OFF),
    ],
)
def test_categories(text: str, parsed: bool, finish_reason: str, category: str) -> None:
    assert error_category(text, parsed, finish_reason) == category
    assert category in CATEGORIES
