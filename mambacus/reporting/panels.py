"""Bars on a common scale, each with an interval; right is always better: changes before and after, methods compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mambacus.reporting.compare import Comparison
from mambacus.reporting.metrics import FAMILIES, family_title, task_info, task_title
from mambacus.reporting.scales import nice_range

FARTHEST = 1000.0  # times the unit: beyond it a bar ends at the edge, or a destroyed model would hide all others


@dataclasses.dataclass(frozen=True)
class Interval:
    """A change with its interval: words beside it, words on hover, verdict, and single runs behind it as ``dots``."""

    title: str
    low: float
    high: float
    middle: float
    text: str
    tip: str
    verdict: str
    dots: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bar:
    """An interval on a panel's scale, in percent from the left."""

    row: Interval
    low: float
    high: float
    middle: float
    dots: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Changes that share one scale: its title, unit, zero line, tick marks (percent, text) and bars."""

    title: str
    note: str
    zero: float
    ticks: tuple[tuple[float, str], ...]
    bars: tuple[Bar, ...]


def change_panels(rows: Sequence[Comparison]) -> list[Panel]:
    """Return the gain-and-cost panels of one pair: shares by family, then perplexities, then the rest."""
    shares = [
        (family_title(family), "change in percentage points", 100.0, False,
         [row for row in rows if row.kind == "share" and task_info(row.task).family == family])
        for family in FAMILIES
    ]  # fmt: skip
    turned = "change in percent, lower is better: the axis is turned so that right is better"
    other = [
        ("Perplexity", turned, 100.0, True, [row for row in rows if row.kind == "perplexity"]),
        ("Correlation", "change", 1.0, False, [row for row in rows if row.kind == "correlation"]),
    ]
    made = [
        make_panel(title, note, [_interval(row) for row in chosen], scale, flip=flip)
        for title, note, scale, flip, chosen in [*shares, *other]
    ]
    return [panel for panel in made if panel is not None]


def _interval(row: Comparison) -> Interval:
    title, text = task_title(row.task, row.metric), change_text(row)
    tip = f"{title}\n{text} on {row.n} items"
    return Interval(title, row.low, row.high, row.change, text, tip, row.verdict)


def make_panel(title: str, note: str, rows: Sequence[Interval], scale: float, *, flip: bool) -> Panel | None:
    """Place intervals on one scale.

    Args:
        title: name of the panel.
        note: the unit in words.
        rows: what is drawn; without any there is no panel.
        scale: a change is multiplied by it for the tick marks (100 for percent).
        flip: lower is better, so the axis is turned.
    """
    left_out = [row.title for row in rows if not _drawable(row)]
    rows = [row for row in rows if _drawable(row)]
    if not rows:
        return None
    if left_out:
        note = f"{note}; left out, not finite: {', '.join(left_out)}"
    unit = -scale if flip else scale
    ends = [unit * value for row in rows for value in (row.low, row.high, *row.dots)]
    ends = [min(max(end, -FARTHEST * scale), FARTHEST * scale) for end in ends]
    low, high, step = nice_range(min([*ends, 0.0]), max([*ends, 0.0]))

    def place(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (unit * value - low) / (high - low))), 2)

    bars = []
    for row in rows:
        left, right = sorted((place(row.low), place(row.high)))
        bars.append(Bar(row, left, right, place(row.middle), tuple(place(dot) for dot in row.dots)))
    count = round((high - low) / step)
    sign = -1.0 if flip else 1.0
    ticks = tuple((round(100 * index / count, 2), _tick(sign * (low + index * step))) for index in range(count + 1))
    return Panel(title, note, place(0.0), ticks, tuple(bars))


def _drawable(row: Interval) -> bool:
    return all(math.isfinite(value) for value in (row.low, row.middle, row.high, *row.dots))


def change_text(row: Comparison) -> str:
    """Return a change with its unit: ``+3.1 points``, ``−0.8 %`` or ``+0.012``."""
    if row.kind == "share":
        text = f"{100 * row.change:+.1f} points"
    elif row.kind == "perplexity":
        text = f"{100 * row.change:+.1f} %" if row.change < 100 else f"× {row.after / row.before:.2g}"
    else:
        text = f"{row.change:+.3f}"
    return text.replace("-", "−")


def _tick(value: float) -> str:
    return f"{value:+.6g}".replace("-", "−") if abs(value) > 1e-12 else "0"
