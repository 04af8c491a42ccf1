r"""From a completion to its final answer, and from two answers to a verdict.

Rules, in this order, on the first answer only (a completion that runs on into a new question is cut there):
``#### N``, ``\boxed{N}``, "answer is N", the last number. What an explicit mark introduces is final: when it holds no
answer, the completion is unparsed and no later rule guesses. Equality is math-verify's, on exact values.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mambacus.data.prompts import ANSWER_MARK
from mambacus.evals.quantities import NUMERATOR, PART, SCALE, SCALES, in_words, joined_groups, plain_digits, two_units

UNPARSED = "unparsed"


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The final answer of a completion.

    Attributes:
        text: the answer as it stands in the completion (a letter for multiple choice), or None.
        reason: the rule that found it: ``####``, ``boxed``, ``answer is``, ``last number``, ``last letter``,
            ``option text`` or ``unparsed``.
    """

    text: str | None
    reason: str


_NOT_FOUND = Extraction(None, UNPARSED)
logging.getLogger("math_verify").setLevel(
    logging.CRITICAL
)  # it warns of what it cannot compare, which is a wrong answer

_TURN = r"(?:Question|Problem|Q|Exercise|Example|Human|User|Instructions?)[ \t]*\d*[ \t]*"
_RUN_ON = re.compile(
    r"(?:^|\n)[ \t]*(?:Question|Problem|Q)[ \t]*\d*[ \t]*:|\bQuestion:"
    rf"|\n[ \t]*[#*_]*[ \t]*{_TURN}[*_]*:|\n[ \t]*#+[ \t]*{_TURN}(?=\n|$)"
)
_ANSWER_IS = re.compile(r"\banswer\s*(?:(?:is|was|would be)\b(?!['’])|=|:)+\s*:?", re.IGNORECASE)
_DENIED = re.compile(r"\banswer\s+(?:is|was|would)n['’]t\b.*?(?=\bbut\b|[.!?](?:\s|$)|$)", re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"\n|(?<![Aa]pprox)(?<!\bNo)[.!?](?=\s|$)")

_LONGEST_NUMBER = 300  # characters; a model that repeats digits for ever has not answered
_SHORT_SCALES = {"k": Fraction(1000), "K": Fraction(1000), "M": Fraction(10**6)}  # right after the digits
_CURRENCY = "$€£¥"
# 1.234,5 and 1.234.567 and 1,5 are European; 1.234 and 1,234 are read as English writes them.
_EUROPEAN = r"\d{1,3}(?:\.\d{3})+,\d{1,2}(?![\d,]*\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.,]*\d)|\d+,\d{1,2}(?![\d,.]*\d)"
_DIGITS = (
    rf"(?:{_EUROPEAN}|(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,]*\d)|\d++)(?:\.\d++)?(?:[eE][-+]?\d{{1,2}}(?!\d))?(?![eE][-+]?\d)"
    r"|(?<![\w.])\.\d++)"
)
# A minus after a digit, letter or bracket subtracts: "10-3" ends in 3, "= -3" in -3.
_SIGN = r"(?:(?<![\w)\]])[-−–+])?"
_NUMBER = re.compile(
    rf"{_SIGN}[{_CURRENCY}]?(?:(?<=[{_CURRENCY}])[-−])?(?<![A-Za-z_])(?<!\d)(?<!\d\.)(?<!\d,)"
    rf"(?:\d+\s+(?:and\s+)?\d+\s*/\s*\d++|{_DIGITS}(?:\s*/\s*[{_CURRENCY}]?\d++(?!\.\d))?)"
    rf"(?!(?:st|nd|rd|th)\b)(?:\s*(?:%|percent\b|(?:{SCALE})(?!\w))|[kKM](?!\w))?"
)
# Powers and factorials that no computer writes out: 2^999999999, 10^{10^{10}}, 99999!
_HUGE = re.compile(r"(?:\^|\*\*)[\s{(+-]*\d{5,}|\d\s*(?:\^|\*\*)[\s{(+-]*\d+\s*(?:\^|\*\*)|\d{4,}\s*!")
# What makes a number a part of something else: 1.2.3, 5'10", 0x10
_GOES_ON = re.compile(r"\.\d|['’′]\s*\d|(?<=\b0)x[\da-fA-F]|\s*!!")
_ORDINAL = re.compile(r"(?<![\w.])\d+(?=(?:st|nd|rd|th)\b)")
_SUM = re.compile(rf"{_NUMBER.pattern}(?:\s*[-+*/×÷]\s*{_DIGITS})+(?![\w.])")  # 5 + 3, left for the reader to add
_ANOTHER = re.compile(r"\s*(?:[a-z]+\s+)?(?:(?:or|to|through|and)\s+|,\s*(?:(?:or|and)\s+)?|–\s*)[$€£¥-]?\d", re.I)


def first_answer(completion: str) -> str:
    """Return the completion up to where it starts a new question of its own."""
    match = _RUN_ON.search(completion)
    return completion[: match.start()] if match else completion


def extract_number(completion: str) -> Extraction:
    """Return the final number of a completion as written there, such as ``$1,234.50``, ``3 1/2``, ``-3`` or ``50%``."""
    text = plain_digits(first_answer(completion))
    marked = marked_segment(text)
    if marked is not None:
        segment, reason = marked
        factorial = reason == "boxed" and re.search(r"\d\s*!", segment)
        number = None if factorial else _number_in(segment)
        return Extraction(number, reason) if number else _NOT_FOUND
    numbers = _NUMBER.findall(_DENIED.sub("", text))
    return Extraction(numbers[-1].strip(), "last number") if numbers else _NOT_FOUND


def extract_letter(completion: str, options: Sequence[str]) -> Extraction:
    """Return the letter a multiple-choice completion settles on: A for ``options[0]``, B for ``options[1]`` ...

    An answer that gives an option's text or an equal number instead of its letter counts as that letter.
    """
    letters = "ABCDEFGHIJ"[: len(options)]
    text = first_answer(completion)
    marked = marked_segment(text)
    if marked is not None:
        segment, reason = marked
        match = re.match(
            rf"\W*(?:(?i:option|choice|text|answer)\W*)?(?:([{letters}])(?![A-Za-z'])|\(?([{letters.lower()}])\))",
            segment,
        )
        if match and re.match(rf"\W*(?:or|and)\W+[{letters}](?![A-Za-z'])", segment[match.end() :]):
            return _NOT_FOUND  # two letters are no choice
        if match:
            return Extraction((match[1] or match[2]).upper(), reason)
        return _option_named(segment, options, letters)
    bracketed = re.findall(rf"\(([{letters}{letters.lower()}])\)|(?<!\w)([{letters}])\)", text)
    alone = [first or second for first, second in bracketed] or re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", text)
    # "A" also opens English sentences: alone it counts only when it is all there is.
    if alone and (bracketed or set(alone) != {"A"} or text.strip(" .") == "A"):
        return Extraction(alone[-1].upper(), "last letter")
    return _option_named(text, options, letters)


def same_number(gold: str, predicted: str) -> bool:
    """Return whether two numbers are equal by math-verify: exactly, or to six decimals when one is a decimal.

    ``50%`` equals both ``50`` and ``0.5``. Text that is not a plain number is read by math-verify's LaTeX and
    expression parsers.
    """
    from math_verify import verify

    gold_values, predicted_values = _values(gold), _values(predicted)
    return bool(gold_values and predicted_values and verify(gold_values, predicted_values))


def canonical(answer: str) -> str:
    """Return one spelling for equal numbers (``29.00`` and ``$29`` give ``29``), so that votes can be counted.

    What may mean two values names both (``50%`` gives ``50 or 1/2``) and is no vote for either alone: gold answers tell
    them apart.
    """
    units = two_units(answer)
    if units is not None:
        return " or ".join(map(str, units[1:]))
    value = _plain_value(answer)
    if value is None:
        return answer.strip()
    factor = Fraction(1, 100) if re.search(r"%|percent", answer) else _scale(answer)
    return str(value) if factor is None else f"{value} or {value * factor}"


def marked_segment(text: str) -> tuple[str, str] | None:
    """Return what the strongest answer mark introduces, and the mark's name."""
    if ANSWER_MARK in text:
        return _line(text.split(ANSWER_MARK, 1)[1].lstrip("#")), ANSWER_MARK
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed, "boxed"
    mentions = list(_ANSWER_IS.finditer(text))
    if mentions:
        rest = text[mentions[-1].end() :].lstrip()
        end = _SENTENCE_END.search(rest)
        return rest[: end.start()] if end else rest, "answer is"
    return None


def _line(text: str) -> str:
    return text.lstrip().split("\n", 1)[0].strip()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, to the end where it is not closed; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return text[begin + 1 :]


def _number_in(segment: str) -> str | None:
    """Return the number of a short answer: after its last ``=``, else the first one; LaTeX is kept whole.

    None where it is no single number: two of them (``5 or 6``, ``3 to 5``), a time or ratio (``3:30``), ``not 5``.
    """
    segment = re.sub(r"^([-−])\s+(?=[\d$])", r"\1", segment.strip().strip("*_`"))
    segment = segment.replace("{,}", ",").replace("\\%", "%")  # LaTeX's 1,234 without a space, and its 50%
    segment = re.sub(r"(?:\bsqrt|√)\s*(?:\(([^()]*)\)|(\d+))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", segment)
    if re.search(r"\\[dt]?frac|\\times|\\sqrt|\d\s*\^", segment):
        return segment
    segment = re.sub(r"^([-−])\s*\(\s*([$€£¥]?[\d.,/]+)\s*\)", r"\1\2", segment)
    if re.match(r"[-−]\s*\(", segment):
        return None
    segment = re.sub(r"^not\b.*?\bbut\b", "", segment, flags=re.IGNORECASE)
    if re.match(r"not\b", segment, re.IGNORECASE):
        return None
    segment = joined_groups(re.sub(r"\b(?:negative|minus)\s+(?=[\d.$€£¥])", "-", segment, flags=re.IGNORECASE))
    tail = segment.rsplit("=", 1)[1] if "=" in segment else segment
    tail = tail if _NUMBER.search(tail) else segment
    units = two_units(tail)
    if units is not None:
        return units[0]
    match = _NUMBER.search(tail)
    if match is None:
        ordinal = _ORDINAL.search(tail)
        return ordinal[0] if ordinal else in_words(tail)
    whole = _SUM.match(tail, match.start())
    if whole and whole.end() > match.end():
        return whole[0]
    after = tail[match.end() :]
    share = re.match(r"\s+out\s+of\s+(\d+)(?![\d.,]*\d)", after)
    if share:
        return f"{match[0].strip()}/{share[1]}" if match[0].strip().isdecimal() else None
    if re.match(rf"\s+and\s+(?:an?|{NUMERATOR})[\s-]+(?:{PART})\b", after, re.IGNORECASE):
        return in_words(tail[match.start() :])
    if _GOES_ON.match(tail, match.end()):
        return None
    clock = re.match(r":\d\d?(?!\d)", after)
    if _ANOTHER.match(after) or (clock and clock[0] != ":00"):
        return None
    return match[0].strip()


def _option_named(segment: str, options: Sequence[str], letters: str) -> Extraction:
    plain = _bare(segment)
    named = [letter for letter, option in zip(letters, options, strict=True) if plain == _bare(option)]
    if not named:
        number = _number_in(segment)
        named = [
            letter
            for letter, option in zip(letters, options, strict=True)
            if number and _plain_value(option) is not None and same_number(option, number)
        ]
    return Extraction(named[0], "option text") if len(named) == 1 else _NOT_FOUND


def _bare(text: str) -> str:
    return text.strip(" .*$()").casefold()


def _values(text: str) -> list[Any]:
    """Return the sympy values that a written number may mean."""
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if len(text) > _LONGEST_NUMBER:
        return []
    units = two_units(text)
    if units is not None:
        return [sympy.Rational(value.numerator, value.denominator) for value in units[1:]]
    exact = _plain_value(text)
    if exact is None:
        if too_large(text):
            return []
        text = re.sub(r"(?<=\d)\s*[x×]\s*(?=\d)", "*", text.replace("÷", "/"))
        latex = f"${text}$" if re.search(r"[\\^]", text) else text
        return list(parse(latex, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()]))
    # math-verify compares floats to six decimals and rationals exactly: 0.333333 may stand for 1/3, 1/3 not for 0.34
    rational = sympy.Rational(exact.numerator, exact.denominator)
    value = sympy.Float(rational, 30) if "." in text or "," in text else rational
    if re.search(r"%|percent", text):
        return [value, value / 100]
    scale = _scale(text)
    return [value] if scale is None else [value, value * sympy.Rational(scale.numerator, scale.denominator)]


def too_large(text: str) -> bool:
    """Return whether a text holds a power or factorial whose value would take seconds or all memory."""
    return _HUGE.search(text) is not None


def _scale(text: str) -> Fraction | None:
    """Return what the word after a number multiplies it by."""
    match = re.search(rf"(?<![A-Za-z])({SCALE}|(?<=\d)[kKM])(?!\w)", text)
    return (SCALES | _SHORT_SCALES)[match[1]] if match else None


def _plain_value(text: str) -> Fraction | None:
    """Return the exact value of a plain number: sign, currency, separators, decimals, fraction or mixed number.

    A word of scale or percent after it is left to the caller.
    """
    text = plain_digits(text)
    match = _NUMBER.fullmatch(text.strip().rstrip("."))
    if not match or len(text) > _LONGEST_NUMBER:
        return None
    plain = re.sub(rf"[{_CURRENCY}+]|%|percent|{SCALE}|[kKM]$", "", match[0]).replace("−", "-").replace("–", "-")
    if re.search(_EUROPEAN, plain):
        plain = plain.replace(".", "").replace(",", ".")
    plain = plain.replace(",", "")
    negative = "-" in plain.lower().replace("e-", "")
    parts = re.sub(r"\s*/\s*", "/", plain.replace(" and ", " ")).replace("-", "", int(negative)).split()
    try:
        value = sum((Fraction(part) for part in parts), Fraction(0))
    except ZeroDivisionError:
        return None
    return -value if negative else value
