"""Sums as plain statements: generated facts, and the data folder's questions rewritten without a question.

    17 + 25 = 42
    6 times 7 is 42.

Equations are spaced as in the solutions of `wordproblems`: spaces around the sign and the equals sign.
"""

from __future__ import annotations

import random
import re

from mambacus.data.templates import MAX_RESULT

_PRIMED = 20  # sums within this range are repeated often, as a times table is
_WORDS = {
    "+": ("{a} plus {b} is {r}.", "{a} and {b} make {r}.", "Add {b} to {a} and you get {r}."),
    "-": ("{a} minus {b} is {r}.", "{b} from {a} leaves {r}.", "Take {b} from {a} and {r} is left."),
    "*": ("{a} times {b} is {r}.", "{a} groups of {b} are {r}.", "The product of {a} and {b} is {r}."),
    "/": ("{a} divided by {b} is {r}.", "{b} goes into {a} {r} times.", "{a} shared among {b} gives {r} each."),
}  # fmt: skip


def fact(rng: random.Random) -> tuple[int, str, int, int]:
    """Return one sum ``(a, sign, b, result)`` with non-negative integers; quotients are exact."""
    sign = rng.choices("+-*/", weights=[38, 34, 16, 12])[0]
    small = rng.random() < 0.25
    if sign in "+-":
        low = rng.randint(0, _PRIMED if small else MAX_RESULT)
        high = rng.randint(0, _PRIMED if small else MAX_RESULT - low)
        return (low, "+", high, low + high) if sign == "+" else (low + high, "-", low, high)
    a = rng.randint(1, 12)
    b = rng.randint(1, 12 if small else max(12, MAX_RESULT // a))
    if sign == "*":
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return a, "*", b, a * b
    return (a * b, "/", a, b) if rng.random() < 0.6 else (a * b, "/", b, a)


def fact_sheet(rng: random.Random) -> str:
    """Return one document of 8 to 24 facts: equations a line, equations in a row, or sentences."""
    facts = [fact(rng) for _ in range(rng.randint(8, 24))]
    kind = rng.random()
    if kind < 0.2:
        return " ".join(rng.choice(_WORDS[sign]).format(a=a, b=b, r=result) for a, sign, b, result in facts)
    cross = "x" if rng.random() < 0.15 else "*"
    equations = [f"{a} {cross if sign == '*' else sign} {b} = {result}" for a, sign, b, result in facts]
    return "\n".join(equations) if kind < 0.75 else ". ".join(equations) + "."


# The questions of `arithmetic_train`, from DeepMind's mathematics generator. Expressions are written with spaces around
# signs there as in "2 + -3" or without as in "2+3"; only whole numbers are taken.

_N = r"(-?\d{1,6})"
_ASK = r"(?:What is |Calculate |Work out |Evaluate |What is the value of )?(?:the )?"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(_ASK + pattern + r"[.?]?"), statement)
    for pattern, statement in (
        (rf"{_N} ?\+ ?{_N}", "{0} + {1} = {answer}"),
        (rf"{_N} - {_N}", "{0} - {1} = {answer}"),
        (rf"{_N} ?\* ?{_N}", "{0} * {1} = {answer}"),
        (rf"{_N} ?/ ?{_N}", "{0} / {1} = {answer}"),
        (rf"{_N} plus {_N}", "{0} plus {1} is {answer}."),
        (rf"{_N} (?:minus|take away) {_N}", "{0} minus {1} is {answer}."),
        (rf"{_N} less than {_N}", "{0} less than {1} is {answer}."),
        (rf"{_N} times {_N}", "{0} times {1} is {answer}."),
        (rf"{_N} divided by {_N}", "{0} divided by {1} is {answer}."),
        (rf"(?:Add|Sum|Put together|Add together|Total of) {_N} and {_N}", "{0} and {1} make {answer}."),
        (rf"Subtract {_N} from {_N}", "{0} from {1} leaves {answer}."),
        (rf"(?:Multiply|[Pp]roduct of) {_N} and {_N}", "The product of {0} and {1} is {answer}."),
        (rf"Divide {_N} by {_N}", "{0} divided by {1} is {answer}."),
        (rf"(?:distance|difference) between {_N} and {_N}", "From {0} to {1} it is {answer}."),
        (rf"remainder when {_N} is divided by {_N}", "The remainder of {0} divided by {1} is {answer}."),
        (
            rf"(?:greatest|highest) common (?:factor|divisor) of {_N} and {_N}",
            "The greatest common divisor of {0} and {1} is {answer}.",
        ),
        (
            rf"(?:lowest|least|smallest) common multiple of {_N} and {_N}",
            "The least common multiple of {0} and {1} is {answer}.",
        ),
        (rf"([a-z]+(?: [a-z]+)?) digit of {_N}", "The {0} digit of {1} is {answer}."),
        (
            r"How many minutes are there between (\d+:\d\d [AP]M) and (\d+:\d\d [AP]M)",
            "From {0} to {1} it is {answer} minutes.",
        ),
        (r"(\d+) minutes (after|before) (\d+:\d\d [AP]M)", "{0} minutes {1} {2} it is {answer}."),
    )
)
_WHOLE = re.compile(r"-?\d{1,6}(:\d\d [AP]M)?")


def statement(question: str, answer: str) -> str | None:
    """Return both as one statement, or None where no rule fits (fractions, long numbers, other kinds)."""
    if not _WHOLE.fullmatch(answer):
        return None
    for pattern, text in _RULES:
        match = pattern.fullmatch(question)
        if match:
            return text.format(*match.groups(), answer=answer)
    return None
