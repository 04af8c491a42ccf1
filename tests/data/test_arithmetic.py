"""Generated sums and rewritten questions are right."""

from __future__ import annotations

import operator
import random
import re

import pytest

from mambacus.data.arithmetic import fact, fact_sheet, statement

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_facts_are_right_and_of_every_kind() -> None:
    rng = random.Random(0)
    facts = [fact(rng) for _ in range(20_000)]
    assert all(OPERATIONS[sign](a, b) == result and min(a, b, result) >= 0 for a, sign, b, result in facts)
    assert all(sum(sign == wanted for _, sign, _, _ in facts) > 2_000 for wanted in "+-*/")
    divisors = {b for _, sign, b, _ in facts if sign == "/"}
    assert max(divisors) > 50


def test_sheets_are_right() -> None:
    rng = random.Random(1)
    for _ in range(300):
        sheet = fact_sheet(rng)
        equations = re.findall(r"(\d+) ([-+*x/]) (\d+) = (\d+)", sheet)
        for left, sign, right, result in equations:
            assert OPERATIONS[sign.replace("x", "*")](int(left), int(right)) == int(result), sheet
        assert len(equations) >= 8 or "=" not in sheet


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What is 5 + -3?", "2", "5 + -3 = 2"),
        ("Work out 12*4.", "48", "12 * 4 = 48"),
        ("Divide 96 by 8.", "12", "96 divided by 8 is 12."),
        ("Subtract 3 from 10.", "7", "3 from 10 leaves 7."),
        ("Calculate the remainder when 66 is divided by 13.", "1", "The remainder of 66 divided by 13 is 1."),
        ("What is the highest common factor of 12 and 18?", "6", "The greatest common divisor of 12 and 18 is 6."),
        ("What is the ten thousands digit of 25593?", "2", "The ten thousands digit of 25593 is 2."),
        (
            "How many minutes are there between 4:37 AM and 3:56 PM?",
            "679",
            "From 4:37 AM to 3:56 PM it is 679 minutes.",
        ),
        ("What is 373 minutes after 4:00 PM?", "10:13 PM", "373 minutes after 4:00 PM it is 10:13 PM."),
        ("What is 1.5 + 2?", "3.5", None),
        ("What is 1/2 + 1/2?", "1", None),
        ("In base 3, what is 20 + 11?", "101", None),
        ("Is 12 prime?", "False", None),
        ("What is 12345678 + 1?", "12345679", None),
    ],
)
def test_questions_become_statements(question: str, answer: str, expected: str | None) -> None:
    assert statement(question, answer) == expected
