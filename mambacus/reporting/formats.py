"""Numbers as readers see them: one place for units, digits and signs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from mambacus.reporting.metrics import metric_kind

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any) -> float | None:
    """Return a JSON value as a float (records write ``"nan"`` and ``"inf"`` as strings), or None if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def finite(value: Any) -> float | None:
    """Return a JSON value as a float, or None if it is no number, not a number or infinite."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def fixed(value: Any, spec: str) -> str:
    """Return a number by a format specification such as ``.2f``, or a dash."""
    return "–" if finite(value) is None else format(value, spec)


def show(metric: str, value: float | None) -> str:
    """Return a value of ``metric`` as readers see it: shares in percent, perplexities with three to four digits."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if metric_kind(metric) == "share":
        return f"{100 * value:.1f} %"
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}".replace("-", "−")


def axis_end(metric: str, value: float) -> str:
    """Return the end of an axis without needless decimals."""
    scale, unit = (100.0, " %") if metric_kind(metric) == "share" else (1.0, "")
    shown = float(f"{scale * value:.4g}")
    text = f"{shown:.1e}" if abs(shown) >= 1e5 else f"{shown:,.10g}"
    return text.replace("-", "−") + unit


def reference(numbers: Iterable[int]) -> str:
    """Return the marks that lead from a figure to its records, for example `` [1][4]``."""
    return " " + "".join(f"[{number}]" for number in sorted(set(numbers)))


def percent(value: Any) -> str:
    """Return a share in percent with one decimal, or a dash."""
    found = finite(value)
    return "–" if found is None else f"{100 * found:.1f} %"


def rate(value: Any) -> str:
    """Return tokens per second with about three digits, or a dash."""
    found = finite(value)
    return "–" if found is None else f"{found:,.1f}" if found < 100 else f"{found:,.0f}"


def size(value: Any) -> str:
    """Return bytes in KiB, MiB or GiB, or a dash."""
    found = finite(value)
    if found is None:
        return "–"
    if found >= 2**30:
        return f"{_three(found / 2**30)} GiB"
    return f"{_three(found / 2**20)} MiB" if found >= 2**20 else f"{_three(found / 2**10)} KiB"


def duration(seconds: Any) -> str:
    """Return seconds in words: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``; or a dash."""
    found = finite(seconds)
    if found is None:
        return "–"
    if found < 60:
        return f"{found:.1f} s"
    minutes = round(found) // 60
    return f"{minutes} min {round(found) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def p_text(p: float) -> str:
    """Return a p-value: three decimals down to 0.001, then a power of ten; or a dash."""
    if not math.isfinite(p):
        return "–"
    if p >= 0.001:
        return f"{p:.3f}"
    if p < 1e-300:
        return "< 10⁻³⁰⁰"
    digit, _, power = f"{p:.0e}".partition("e")
    return f"{digit} × 10{str(int(power)).translate(_RAISED)}"


def whole(value: Any) -> str:
    """Return a whole number with all its digits, or a dash."""
    found = finite(value)
    return "–" if found is None else f"{int(found):,}"


def count(value: Any) -> str:
    """Return a large count with three digits and a prefix, for example ``26.2 T``; or a dash."""
    found = finite(value)
    if found is None:
        return "–"
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if found >= 10**power:
            return f"{found / 10**power:.3g} {prefix}"
    return f"{found:,.0f}"


def milliseconds(value: Any) -> str:
    """Return milliseconds with three digits, as seconds from 10,000 on; or a dash."""
    found = finite(value)
    if found is None:
        return "–"
    return f"{_three(found / 1000)} s" if found >= 10_000 else f"{_three(found)} ms"


def energy(joules: Any) -> str:
    """Return joules with three digits, or a dash."""
    found = finite(joules)
    return "–" if found is None else f"{_three(found)} J"


def _three(value: float) -> str:
    """Return a number with three digits; whole numbers keep all of theirs."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
