"""Answers that are expressions: found by their marks, equal whatever way they are written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mambacus.data.sources import load_math
from mambacus.evals.expressions import canonical_expression, extract_expression, same_expression

EQUAL = [
    (r"\frac{1}{2}", "0.5", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
    (r"6p^4 + 5p^2 - 4", "5p^2+6p^4-4", True),
    (r"45^\circ", "45", True),
    (r"162\text{ minutes}", "162", True),
    (r"\frac65", r"\dfrac{6}{5}", True),
    ("0,4", "0, 4", True),
    (r"-\frac{3}{2}, -1, 7", "7, -1, -3/2", True),
    (r"7\%", "7", True),
    ("2", r"2\sqrt{3}", False),
    ("2", "2x", False),
    ("35", "x=35", True),
    ("(-5,-4)", "(-4,-5)", False),
    (r"\begin{pmatrix} 0 \\ 1 \end{pmatrix}", r"\begin{pmatrix}0\\1\end{pmatrix}", True),
    (r"\begin{pmatrix} 0 \\ 1 \end{pmatrix}", r"\begin{pmatrix}1\\0\end{pmatrix}", False),
    ("[1,2)", "(1,2)", False),
    ("[1,2)", "[1, 2)", True),
    ("16592", "16,592", True),
    (r"6 \frac{3}{4}", "27/4", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("(1,234)", "(1234)", False),
    ("x^2", "x^3", False),
    (r"\text{Evelyn}", r"\text{Evelyn}", True),
    ("2", "x" * 5000, False),
]


@pytest.mark.parametrize(("gold", "predicted", "equal"), EQUAL)
def test_equality(gold: str, predicted: str, equal: bool) -> None:
    assert same_expression(gold, predicted) is equal


@pytest.mark.parametrize(
    ("completion", "extracted", "reason"),
    [
        (r"so $x=3$ and $y=\frac{1}{2}$.", r"y=\frac{1}{2}", "last formula"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}", "answer is"),
        (r"#### \frac{1}{2}", r"\frac{1}{2}", "####"),
        (r"first \boxed{5}, then \boxed{(1,2)}", "(1,2)", "boxed"),
        (r"#### $\boxed{3}$", "3", "####"),
        ("The answer is (3, 4).", "(3, 4)", "answer is"),
        (r"thus \(x^2\).", "x^2", "last formula"),
        ("thus 7", "7", "last number"),
        ("no idea", None, "unparsed"),
        ("####", None, "unparsed"),
        ("#### 3\n\nQuestion: next?\nAnswer: #### 4", "3", "####"),
    ],
)
def test_extraction(completion: str, extracted: str | None, reason: str) -> None:
    found = extract_expression(completion)
    assert (found.text, found.reason) == (extracted, reason)


def test_votes_for_one_expression_count_together() -> None:
    spellings = (r"\dfrac12", r"\frac{1}{2}", r"\frac{ 1 }{ 2 }", r"$\frac{1}{2}$", r"x = \frac{1}{2}")
    assert len({canonical_expression(text) for text in spellings}) == 1
    assert canonical_expression("(1,2)") != canonical_expression("[1,2)")


def test_published_solutions_are_right(data_dir: Path) -> None:
    """Every tenth problem of MATH-500: its worked solution gives its answer."""
    problems = load_math(data_dir, "math", "math500")[::10]
    for problem in problems:
        found = extract_expression(problem.solution or "")
        assert found.text is not None and same_expression(problem.answer, found.text), problem.id


@pytest.mark.slow
def test_hard_expressions_come_back() -> None:
    """math-verify gives up on each after a few seconds."""
    start = time.process_time()
    assert not same_expression("1", "2^{2^{2^{2^{2^{99}}}}}")
    assert time.process_time() - start < 60


def test_deep_brackets_come_back() -> None:
    start = time.process_time()
    same_expression("1", "(" * 140 + "1" + ")" * 140)
    assert time.process_time() - start < 60
