r"""Answers that are expressions, as in MATH: intervals, tuples, roots, polynomials, in LaTeX or plain.

Found by the same marks as numbers (``####``, ``\boxed{}``, "answer is"), then the last formula between dollars, then
the last number. Equal if they read the same but for LaTeX's ways of spacing and sizing, or by math-verify.
"""

from __future__ import annotations

import re

from mambacus.evals.answers import Extraction, extract_number, first_answer, last_boxed, marked_segment, too_large

_LONGEST = 300  # characters: what is longer is no answer, and sympy would not come back
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SPACING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\(?:big|Big|displaystyle|quad)(?![a-z])|\s|~")
_ENDING = re.compile(r"(?:\^\{?\\circ\}?|\\%|%|\\text\{[^{}]*\}|\\mbox\{[^{}]*\})+$")
_NAME = re.compile(r"^(?:[a-zA-Z](?:\([a-z]\))?|\\text\{[^{}]*\})\s*=\s*(?!.*=)")


def extract_expression(completion: str) -> Extraction:
    """Return the final expression of a completion, without the dollars around it."""
    text = first_answer(completion)
    marked = marked_segment(text)
    if marked is not None:
        segment, reason = marked
        answer = _bare(segment)
        return Extraction(answer or None, reason if answer else "unparsed")
    formulas = [next(part for part in match.groups() if part) for match in _FORMULA.finditer(text)]
    if formulas:
        return Extraction(_bare(formulas[-1]), "last formula")
    return extract_number(text)


def same_expression(gold: str, predicted: str) -> bool:
    r"""Return whether two expressions are equal: as text without LaTeX's spacing, or by math-verify's ``verify``."""
    if max(len(gold), len(predicted)) > _LONGEST:
        return False
    if _plain(gold) == _plain(predicted):
        return True
    if too_large(gold) or too_large(predicted):
        return False
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    one, other = (parse(rf"\boxed{{{text}}}", extraction_config=kinds) for text in (gold, _bare(predicted)))
    return bool(one and other and verify(one, other))


def canonical_expression(answer: str) -> str:
    """Return one spelling for expressions that read the same, so that votes can be counted."""
    return _plain(answer)


def _bare(text: str) -> str:
    """Return the expression in a piece of a sentence: what is boxed, else between dollars, else all of it."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    formula = _FORMULA.search(text)
    if formula:
        return next(part for part in formula.groups() if part).strip()
    return text.strip().strip("*`").removesuffix(".").strip()


def _plain(text: str) -> str:
    """Return the text without spacing, sizes, units and a name before ``=``."""
    text = _NAME.sub("", text.strip().strip("$").removesuffix("."))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = _ENDING.sub("", _SPACING.sub("", text))
    return text if "(" in text else re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)  # (1,234) is a pair
