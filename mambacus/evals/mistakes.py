"""Where a worked answer goes wrong: in its arithmetic or in its set-up.

Every equation between plain numbers in the text, such as ``3 * (4 + 1) = 15``, is computed again, exactly. A wrong
answer with a wrong equation is a slip of arithmetic; one whose equations all hold was set up wrongly.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from collections.abc import Callable
from fractions import Fraction

NO_ANSWER, CUT_OFF, ARITHMETIC, SET_UP, UNCHECKED = "no answer", "cut off", "arithmetic", "set-up", "unchecked"
CATEGORIES = (ARITHMETIC, SET_UP, UNCHECKED, NO_ANSWER, CUT_OFF)

_TOKEN = re.compile(
    r"(?P<number>[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?%)?)"
    r"|(?P<operator>[-+*/×÷−–]|(?<![A-Za-z])(?:x|of)(?![A-Za-z]))"
    r"|(?P<word>[A-Za-z]+)|(?P<open>\()|(?P<close>\))|(?P<equals>=)|(?P<other>\S)"
)
_JOINING = frozenset({"and", "or", "then", "so", "is"})  # words that are no unit
_SPOILING = frozenset("^_!\\{}[]|<≈≠")  # beside an equation these make it another one
_MOST = 60  # tokens of one side

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclasses.dataclass(frozen=True)
class _Token:
    kind: str  # number, operator, unit, open, close, equals or other
    text: str


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation in a text.

    Attributes:
        text: as it stands there.
        right: whether both sides are equal, to the decimals written on the right.
    """

    text: str
    right: bool


def equations(text: str) -> list[Equation]:
    """Return the equations between plain numbers in a text, in order; what is not plain arithmetic is passed over.

    In a chain such as ``2 + 3 = 5 * 2 = 10`` every ``=`` is an equation of its own, right if its left side equals what
    follows or, as people write on, the first number of it.
    """
    return [equation for line in text.splitlines() for equation in _in_line(_tokens(line))]


def _in_line(tokens: list[_Token]) -> list[Equation]:
    found = []
    for place, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left, right = _left_of(tokens, place), _right_of(tokens, place)
        if not any(each.kind == "operator" for each in left[1:]):  # a sign is no arithmetic
            continue
        sides = [right, right[: _first_operand(right)]]
        checks = [check for side in sides if (check := _holds(left, side)) is not None]
        if checks:
            written = (" ".join(each.text for each in side) for side in (left, right))
            found.append(Equation(" = ".join(written), any(checks)))
    return found


def _tokens(line: str) -> list[_Token]:
    """Return the tokens of a line; a word right after an operand is its unit, any other word is ``other``."""
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(re.sub(r"<<[^<>]*>>", "", line)):  # without calculator marks
        kind, text = str(match.lastgroup), match[0]
        if kind == "word":
            follows = bool(tokens) and tokens[-1].kind in ("number", "close")
            glued = len(text) == 1 and line[max(0, match.start() - 1)].isdigit()  # 3y is no three units
            kind = "unit" if follows and not glued and text.lower() not in _JOINING else "other"
        tokens.append(_Token(kind, text))
    return tokens


_OPERAND_ENDS = frozenset({"number", "unit", "close"})
_MAY_PRECEDE = {  # kinds that may stand before a kind inside an expression
    "equals": _OPERAND_ENDS,
    "operator": _OPERAND_ENDS | {"operator", "open"},
    "number": frozenset({"operator", "open"}),
    "open": frozenset({"operator", "open"}),
    "unit": frozenset({"number", "close"}),
    "close": _OPERAND_ENDS,
}


def _left_of(tokens: list[_Token], place: int) -> list[_Token]:
    """Return the longest expression that ends before ``place``, empty if something spoils it."""
    begin = place
    while begin and place - begin < _MOST and tokens[begin - 1].kind in _MAY_PRECEDE[tokens[begin].kind]:
        begin -= 1
    if begin and tokens[begin - 1].text in _SPOILING:
        return []
    return _balanced(tokens[begin:place])


def _right_of(tokens: list[_Token], place: int) -> list[_Token]:
    """Return the longest expression that begins after ``place``, empty if something spoils it."""
    end = place + 1
    while end < len(tokens) and end - place <= _MOST and tokens[end].kind not in ("equals", "other"):
        before = "operator" if end == place + 1 else tokens[end - 1].kind  # ``=`` is followed as an operator is
        if before not in _MAY_PRECEDE[tokens[end].kind]:
            break
        end += 1
    if end < len(tokens) and tokens[end].text in _SPOILING:
        return []
    while end > place + 1 and tokens[end - 1].kind in ("operator", "open"):
        end -= 1
    return _balanced(tokens[place + 1 : end])


def _first_operand(side: list[_Token]) -> int:
    return next((number for number, token in enumerate(side, start=1) if token.kind == "number"), 0)


def error_category(text: str, parsed: bool, finish_reason: str) -> str:
    """Return what kind of error a wrong answer is: one of `CATEGORIES`.

    Args:
        text: the completion, up to where it starts a question of its own.
        parsed: whether it gives a final answer.
        finish_reason: ``length`` if it was cut.
    """
    if not parsed:
        return CUT_OFF if finish_reason == "length" else NO_ANSWER
    found = equations(text)
    if not found:
        return UNCHECKED
    return SET_UP if all(equation.right for equation in found) else ARITHMETIC


def _holds(left: list[_Token], right: list[_Token]) -> bool | None:
    """Return whether two sides are equal to the decimals written on the right, or None if one is not arithmetic."""
    one, other = _value(left), _value(right)
    return None if one is None or other is None else abs(one - other) <= _rounding(right)


def _value(side: list[_Token]) -> Fraction | None:
    """Return the exact value of an expression, or None if it is none."""
    plain = " ".join(_plain(token) for token in side)
    try:
        return _evaluate(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _plain(token: _Token) -> str:
    """Return a token as Python writes it; units vanish."""
    if token.kind == "unit":
        return ""
    if token.kind == "operator":
        return {"×": "*", "÷": "/", "−": "-", "–": "-", "x": "*", "of": "*"}.get(token.text, token.text)
    text = re.sub(r"[$€£,\s]", "", token.text)
    text = re.sub(r"^0+(?=\d)", "", text)  # Python refuses 007
    return f"({text[:-1]}/100)" if text.endswith("%") else text


def _balanced(side: list[_Token]) -> list[_Token]:
    """Drop brackets at the ends that have no partner: those of the sentence around the equation."""
    surplus = sum({"open": 1, "close": -1}.get(token.kind, 0) for token in side)
    while surplus > 0 and side and side[0].kind == "open":
        side, surplus = side[1:], surplus - 1
    while surplus < 0 and side and side[-1].kind == "close":
        side, surplus = side[:-1], surplus + 1
    return side


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise ValueError("not plain arithmetic")


def _rounding(right: list[_Token]) -> Fraction:
    """Return how far the right side may be off: one unit of its last decimal; a whole number not at all."""
    units = []
    for token in right:
        _, point, decimals = token.text.rstrip("% ").partition(".")
        if token.kind == "number" and point:
            units.append(Fraction(1, 10 ** (len(decimals) + 2 * token.text.endswith("%"))))
    return min(units, default=Fraction(0))
