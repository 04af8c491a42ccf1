"""Rows of published math sets as one shape: question, solution, and a final answer that parses.

A converter returns None for a row whose final answer cannot be read; such rows are counted and listed, not guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mambacus.data.prompts import ANSWER_MARK

Row = dict[str, Any]
Converter = Callable[[Row], Row | None]

NUMBER = r"-?\$?\s?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_SIGNED = re.compile(
    rf"(?:(?<![\w.)}}])-)?{NUMBER.removeprefix('-?')}"
)  # after a digit, letter or bracket - is no sign
_GOES_ON = re.compile(  # what stands before a number that is a part of something
    r"\d[)}%]?\s*(?:[-\u2010-\u2015\u2212:^*\u00d7\u00f7/+]|x|to|and|or|\\times|\\cdot|\s)\s*[({$]?\s*$"
    r"|\d\s+(?!(?:is|are|was|equals|gives|makes|leaves)\b)[A-Za-z]+(?:,?\s+and)?\s+\$?$"
    r"|(?:sqrt|frac)\{[^=]*$"
)
_GROWS = re.compile(r"\s*(?:hundred|thousand|million|billion|trillion|dozen|\^|[\u00b2\u00b3!:*\u00d7+]|\d)")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_LAST_LINE = re.compile(rf"{ANSWER_MARK}\s*(.+?)\s*$")
_META = re.compile(r"\s*(?:####\s*\S.*\n)?The answer is:?\s*(.+?)\s*$")
_OPTION = re.compile(r"^\s*\(?([A-Ja-j])\s?\)\s*")
_MATHQA_OPTIONS = re.compile(r"([a-e])\s\)\s(.*?)(?=\s?,\s[a-e]\s\)|$)")


def plain_number(text: str) -> str | None:
    """Return the number that ``text`` is, without thousands separators, currency and trailing zeros; None if none."""
    found = re.fullmatch(rf"\s*({NUMBER})\s*(?:%|\.|\s[A-Za-z.]+)?\s*", text.replace("\\$", "$"))
    if not found:
        return None
    number = re.sub(r"[$,\s]", "", found[1])
    if "." in number and "/" not in number:
        number = number.rstrip("0").rstrip(".")
    return number or None


def gsm8k(row: Row) -> Row | None:
    """GSM8K: the worked answer ends in ``#### N`` and has calculator notes ``<<3*4=12>>``, which are taken out."""
    text = _CALCULATOR.sub("", str(row.get("answer", "")))
    found = _LAST_LINE.search(text)
    number = plain_number(found[1]) if found else None
    if found is None or number is None:
        return None
    return {"question": row.get("question"), "solution": text[: found.start()].strip(), "answer": number}


def orca_math(row: Row) -> Row | None:
    """Orca-Math: a worked answer in prose; the last number of the last sentence is the final answer.

    A row is left out where that sentence has no number, or its last one is only a part of what is said: of a range, a
    ratio, a power, a mixed number, a term without its result, or the second of two quantities.
    """
    text = str(row.get("answer", "")).strip()
    sentences = [line for line in re.split(r"(?<=[.!?])\s+|\n+", text) if line.strip()]
    said = sentences[-1].rpartition("=")[2] if sentences else ""
    found = [*_SIGNED.finditer(said)]
    if not found:
        return None
    last, end = found[-1][0].lstrip(), found[-1].end()
    if _GOES_ON.search(said[: end - len(last)]) or _GROWS.match(said[end:]):
        return None
    number = plain_number(last.rstrip(".,"))
    if number is None:
        return None
    return {"question": row.get("question"), "solution": text, "answer": number}


def metamath(row: Row) -> Row | None:
    """MetaMathQA: ``query`` and ``response``, which ends in ``The answer is: N``."""
    text = str(row.get("response", "")).strip()
    found = _META.search(text)
    if found is None:
        return None
    answer = plain_number(found[1]) or found[1].strip()
    solution = re.sub(rf"\s*{ANSWER_MARK}[^\n]*$", "", text[: found.start()]).strip()
    return {"question": row.get("query"), "solution": solution, "answer": answer}


def aqua(row: Row) -> Row | None:
    """AQuA-RAT: ``options`` like ``A)21``, ``rationale``, and the letter of the right one in ``correct``."""
    options = [_OPTION.sub("", str(option)) for option in row.get("options") or ()]
    return _choice(row.get("question"), options, str(row.get("correct", "")), str(row.get("rationale", "")))


def mathqa(row: Row) -> Row | None:
    """MathQA: ``options`` in one text, ``a ) 38 , b ) 27.675 , ...``, and the letter in ``correct``."""
    options = [text.strip() for _, text in _MATHQA_OPTIONS.findall(str(row.get("options", "")))]
    rationale = str(row.get("Rationale", "")).strip().strip('"').strip()
    return _choice(row.get("Problem"), options, str(row.get("correct", "")), rationale)


def _choice(question: Any, options: list[str], letter: str, rationale: str) -> Row | None:
    letter = letter.strip().upper()
    if len(options) < 2 or letter not in "ABCDEFGHIJ"[: len(options)] or not letter:
        return None
    return {"question": question, "options": options, "solution": rationale or None, "answer": letter}


CONVERTERS: Mapping[str, Converter] = {
    "gsm8k": gsm8k,
    "orca-math": orca_math,
    "metamath": metamath,
    "aqua": aqua,
    "mathqa": mathqa,
}
HUB_CONVERTERS = {
    "openai/gsm8k": "gsm8k",
    "microsoft/orca-math-word-problems-200k": "orca-math",
    "meta-math/MetaMathQA": "metamath",
    "deepmind/aqua_rat": "aqua",
    "allenai/math_qa": "mathqa",
}


def converter_for(name: str, source: str, columns: Mapping[str, Any]) -> str:
    """Return the converter for a source: the one named, or with ``auto`` that of a known set or of telling columns.

    Returns:
        A key of `CONVERTERS`, or ``""`` where rows are taken as they are.
    """
    if name == "none":
        return ""
    if name != "auto":
        return name
    if source.partition(":")[0] in HUB_CONVERTERS:
        return HUB_CONVERTERS[source.partition(":")[0]]
    for keys, found in (
        ({"query", "response"}, "metamath"),
        ({"Problem", "Rationale", "options", "correct"}, "mathqa"),
        ({"question", "rationale", "options", "correct"}, "aqua"),
    ):
        if keys <= set(columns):
            return found
    return ""
