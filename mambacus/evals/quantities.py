"""Numbers as people write them: in words, in other digits and separators, with a scale, or in two units."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SLASHES = str.maketrans({"\u2044": "/", "\u2215": "/", "\u2010": "-", "\u2011": "-", "\ufe63": "-"})
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # to ASCII
_VULGAR = re.compile(r"(\d?)([\u00bc-\u00be\u2150-\u215e])")  # one half, three quarters ... as one character
_GROUPS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # spaces that do not break a line
_MARKED_GROUPS = re.compile(r"(?<=\d)(?:\\[,;:! ]|['’_])(?=\d{3}(?!\d))")  # 1'234, 1_000, LaTeX's 12\,000
_SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/]| */)")

SCALES = {
    "hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6), "billion": Fraction(10**9),
    "trillion": Fraction(10**12), "dozen": Fraction(12), "cent": Fraction(1, 100), "cents": Fraction(1, 100),
    "¢": Fraction(1, 100),
}  # fmt: skip
SCALE = "|".join(sorted(SCALES, key=len, reverse=True))  # longest first: "cents" before "cent"
_UNITS = (  # larger, smaller, how many of it
    (r"h(?:ou)?rs?|h", r"min(?:ute)?s?|m", 60),
    (r"min(?:ute)?s?|m", r"sec(?:ond)?s?|s", 60),
    (r"days?", r"h(?:ou)?rs?|h", 24),
    (r"weeks?", r"days?", 7),
    (r"years?", r"months?", 12),
    (r"feet|foot|ft", r"inch(?:es)?|in", 12),
    (r"pounds?|lbs?", r"ounces?|oz", 16),
    (r"dollars?", r"cents?", 100),
)
_TWO_UNITS = [
    (
        re.compile(
            rf"(?<![\d.,])(-?\d[\d,]*+(?:\.\d+)?)\s*(?:{large})\s*,?\s*(?:and\s+)?(\d+(?:\.\d+)?)\s*(?:{small})\b", re.I
        ),
        count,
    )
    for large, small, count in _UNITS
]

_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60,
    "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10,
}  # fmt: skip
PART = "halves|" + "|".join(f"{name}s?" for name in _PARTS)
NUMERATOR = "|".join(_WORDS)
_WHOLE = rf"-?\d+|(?:{NUMERATOR}|hundred|thousand)(?:(?:[\s-]+|\s+and\s+)(?:{NUMERATOR}|hundred|thousand))*?"
_FRACTION = re.compile(  # a third and two thirds, never "two third"; a bare half or quarter
    rf"\W*(?:(minus|negative)\s+)?(?:({_WHOLE})\s+and\s+)?"
    rf"(?:(?:an?|one)[\s-]+({'|'.join(_PARTS)})|(half|quarter)|({NUMERATOR})[\s-]+(halves|(?:{'|'.join(_PARTS)})s))\b",
    re.I,
)
_GOES_ON = re.compile(
    rf"[\s-]+(?:and\s+)?(?:an?\s+)?(?:{PART}|{NUMERATOR}|dozen|hundred|thousand|million|out\s+of)\b", re.I
)
_NAMED = "|".join([*_WORDS, "hundred", "thousand", "million", "dozen"])
_IN_WORDS = re.compile(
    rf"\W*((?:(?:minus|negative)\s+)?(?:an?\s+)?(?:{_NAMED})(?:(?:[\s-]+|\s+and\s+)(?:{_NAMED}))*)\b(?!\s+of\b)", re.I
)


def plain_digits(text: str) -> str:
    """Return the text with full-width characters, one-character fractions and unbreakable group spaces written plainly.

    ``３½`` becomes ``3 1/2``; digits of other scripts stay, they are digits.
    """
    text = _MARKED_GROUPS.sub("", text)
    if text.isascii():
        return text
    text = text.translate(_FULL_WIDTH)
    text = _VULGAR.sub(lambda m: f"{m[1]}{' ' if m[1] else ''}{unicodedata.normalize('NFKC', m[2])}", text)
    return _GROUPS.sub("", text.translate(_SLASHES))


def joined_groups(text: str) -> str:
    """Return the text with groups of three digits joined where single spaces part them: ``1 000`` becomes ``1000``."""
    return _SPACED.sub(lambda match: match[0].replace(" ", ""), text)


def two_units(text: str) -> tuple[str, Fraction, Fraction] | None:
    """Return the first quantity in two units, such as ``5 hours and 30 minutes``, and its value in each of them."""
    for pattern, count in _TWO_UNITS:
        match = pattern.search(text)
        if match:
            large, small = (Fraction(part.replace(",", "")) for part in match.groups())
            value = large + small / count * (-1 if large < 0 else 1)
            return match[0], value, value * count
    return None


def in_words(text: str) -> str | None:
    """Return, in digits, the number in English words at the beginning of a text; None if there is none."""
    part = _FRACTION.match(text)
    if part is not None:
        return None if _GOES_ON.match(text, part.end()) else _mixed(part)
    match = _IN_WORDS.match(text)
    if match is None or _GOES_ON.match(text, match.end()):
        return None
    return str(_value(match[1]))


def _mixed(match: re.Match[str]) -> str:
    """Return the value of a fraction in words, with what stands whole before it."""
    sign, whole, *single, count, plural = match.groups()
    name = (single[0] or single[1] or plural).lower()
    below = 2 if name == "halves" else _PARTS[name.removesuffix("s")]
    value = Fraction(_WORDS[count.lower()] if count else 1, below)
    if whole:
        before = Fraction(whole) if whole[-1].isdecimal() else _value(whole)
        value = before - value if whole.startswith("-") else before + value
    return str(-value if sign else value)


def _value(named: str) -> Fraction:
    """Return the value of number words."""
    words = [word for word in re.split(r"[\s-]+", named.lower()) if word not in ("and", "a", "an")]
    negative = words[0] in ("minus", "negative")
    total, part = Fraction(0), Fraction(0)
    for word in words[negative:]:
        if word in _WORDS:
            part += _WORDS[word]
        elif word in ("hundred", "dozen"):
            part = (part or 1) * SCALES[word]
        else:
            total, part = total + (part or 1) * SCALES[word], Fraction(0)
    return -(total + part) if negative else total + part
