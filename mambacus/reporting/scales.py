"""Axes of plots: where a value stands, in percent of the plot, and which round values are named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

MOST_TICKS = 6
Text = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Scale:
    """One axis.

    Attributes:
        low: value at 0 %.
        high: value at 100 %.
        log: logarithmic, both ends positive.
        ticks: (value, text) named on the axis.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Return where ``value`` stands, in percent from the low end, clipped to the axis."""
        low, high, at = (math.log(end) for end in (self.low, self.high, max(value, 1e-300))) if self.log else (
            self.low, self.high, value
        )  # fmt: skip
        return round(100 * min(1.0, max(0.0, (at - low) / (high - low))), 2)

    @property
    def x_ticks(self) -> tuple[tuple[float, str], ...]:
        """(percent from the left, text)."""
        return tuple((self.place(value), text) for value, text in self.ticks)

    @property
    def y_ticks(self) -> tuple[tuple[float, str], ...]:
        """(percent from the top, text)."""
        return tuple((round(100 - self.place(value), 2), text) for value, text in self.ticks)


def linear_scale(values: Iterable[float], text: Text, *, zero: bool = False, tight: bool = False) -> Scale:
    """Return a linear axis of round ends around ``values``.

    Args:
        values: what must fit, at least one.
        text: a tick in words.
        zero: begin at zero.
        tight: end at the largest value instead of the next round one.
    """
    found = _finite(values)
    low, high, step = nice_range(0.0 if zero else min(found), max(found))
    if tight and max(found) > low:
        high = max(found)
    marks = [round(low + index * step, 9) for index in range(int((high - low) / step + 1e-9) + 1)]
    return Scale(low, high, False, tuple((mark, text(mark)) for mark in marks))


def log_scale(values: Iterable[float], text: Text, *, base: int = 10) -> Scale:
    """Return a logarithmic axis around positive ``values`` with ticks at round powers of ``base`` (10 or 2)."""
    found = [value for value in _finite(values) if value > 0] or [1.0]
    low, high = min(found) / 1.25, max(found) * 1.25
    return Scale(low, high, True, tuple((mark, text(mark)) for mark in _log_ticks(low, high, base)))


def steps_scale(values: Iterable[float], text: Text) -> Scale:
    """Return an axis whose ticks are the measured values, thinned; logarithmic when they spread over a factor of 8."""
    found = sorted(set(_finite(values)))
    log = found[0] > 0 and found[-1] / found[0] >= 8
    reach = 1.1 if log else 0.04 * (found[-1] - found[0]) or 0.5
    low, high = (found[0] / reach, found[-1] * reach) if log else (found[0] - reach, found[-1] + reach)
    stride = math.ceil(len(found) / MOST_TICKS)
    return Scale(low, high, log, tuple((value, text(value)) for value in found[::-1][::stride][::-1]))


def _finite(values: Iterable[float]) -> list[float]:
    """Return the values that an axis has a place for; one of nothing but others still has its ends."""
    return [value for value in values if math.isfinite(value)] or [0.0]


def nice_range(low: float, high: float, parts: int = 5) -> tuple[float, float, float]:
    """Return (low, high, step) of round numbers around [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9), step


def _log_ticks(low: float, high: float, base: int) -> Sequence[float]:
    first, last = (math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9))
    powers = [float(base) ** exponent for exponent in range(first, last + 1)]
    if len(powers) > (2 if base == 10 else 1):
        return powers[:: math.ceil(len(powers) / MOST_TICKS)]
    marks = [10.0**e * factor for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for factor in
             (1, 2, 5)]  # fmt: skip
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 1:
        return inside
    start, end, step = nice_range(low, high, 4)
    return [mark for index in range(round((end - start) / step) + 1) if low <= (mark := start + index * step) <= high]
