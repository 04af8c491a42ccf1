"""Paired comparisons for a terminal: one table a pair of models, then in words what it does and does not support."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mambacus.reporting.compare import Comparison, conclusion
from mambacus.reporting.metrics import metric_title, task_info
from mambacus.runtime.stats import detectable_difference

_HEAD = ("task", "metric", "items", "before", "after", "change", "95 % interval", "gained", "lost", "p (Holm)", "")


def paired_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table and the sentences for a report record's ``comparisons``; empty if there are none."""
    names = [field.name for field in dataclasses.fields(Comparison)]
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        comparison = Comparison(**{name: row[name] for name in names if name in row})
        pairs.setdefault((comparison.base, comparison.tuned), []).append(comparison)
    return "\n\n".join(_pair_text(base, tuned, found) for (base, tuned), found in pairs.items())


def power_note(row: Comparison) -> str | None:
    """Return a warning where the sample is too small to see a difference like the one found, else None.

    The difference that this many items would show four times in five follows from the share of items on which the
    models disagree (`detectable_difference`); it is told for shares without a verdict.
    """
    if row.kind != "share" or row.gained is None or row.lost is None or row.verdict != "open":
        return None
    disagreement = (row.gained + row.lost) / row.n
    seen = detectable_difference(row.n, disagreement)
    note = (
        f"{task_info(row.task).title}: {row.n:,} items show a difference of {100 * seen:.1f} points four times in five"
    )
    if 0 < abs(row.change) < seen:
        needed = row.n * (seen / abs(row.change)) ** 2
        note += f"; for one of {100 * abs(row.change):.1f} points it takes about {_rounded(needed):,}"
    return note + "."


def _pair_text(base: str, tuned: str, rows: Sequence[Comparison]) -> str:
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    words = [conclusion(row) for row in rows] + [note for row in rows if (note := power_note(row))]
    return "\n".join([f"{tuned} against {base}", *(line.rstrip() for line in lines), "", *words])


def _cells(row: Comparison) -> tuple[str, ...]:
    share = row.kind == "share"
    scale, digits = (100.0, 1) if share or row.kind == "perplexity" else (1.0, 3)
    unit = {"share": " points", "perplexity": " %"}.get(row.kind, "")
    score = (lambda value: f"{100 * value:.1f} %") if share else (lambda value: f"{value:.4g}")
    return (
        task_info(row.task).title,
        metric_title(row.metric),
        f"{row.n:,}",
        score(row.before),
        score(row.after),
        f"{scale * row.change:+.{digits}f}{unit}",
        f"{scale * row.low:+.{digits}f} to {scale * row.high:+.{digits}f}",
        "" if row.gained is None else str(row.gained),
        "" if row.lost is None else str(row.lost),
        "< 0.0001" if row.p_adjusted < 1e-4 else f"{row.p_adjusted:.4f}",
        row.verdict,
    )


def _rounded(value: float) -> int:
    """Return a whole number to two digits: an estimate should not look like a count."""
    digits = max(0, len(str(int(value))) - 2)
    return int(round(value, -digits))
