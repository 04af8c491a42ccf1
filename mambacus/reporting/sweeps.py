"""Methods compared: what ``finetune --sweep`` records hold, one row and one bar per setting, over its seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mambacus.reporting.formats import duration, rate, reference, show, size
from mambacus.reporting.metrics import task_info
from mambacus.reporting.panels import Interval, Panel, make_panel
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, filled, make_table


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep's grid with its runs, which differ in the seed alone."""

    source: Source
    name: str
    runs: tuple[dict[str, Any], ...]

    def mean(self, key: str) -> float:
        """Return the mean of one figure over the runs."""
        return fmean(float(run[key]) for run in self.runs)

    def checks(self, what: str) -> list[dict[str, Any]]:
        """Return what the check found in each run: ``{before, after, change, low95, high95, n, better}``."""
        return [run["check"][what] for run in self.runs if what in run["check"]]


def settings(sources: Sequence[Source]) -> list[Setting]:
    """Return every setting of every sweep, in the order it was run."""
    found = []
    for source in of_kind(sources, "sweep"):
        axes = [axis for axis in source.record.results["axes"] if axis != "seed"]
        groups: dict[str, list[dict[str, Any]]] = {}
        for run in source.record.results["runs"]:
            parts = [str(run[axis]) if axis == "method" else f"{axis.replace('_', ' ')} {run[axis]}" for axis in axes]
            groups.setdefault(", ".join(parts) or source.label, []).append(run)
        found += [Setting(source, name, tuple(runs)) for name, runs in groups.items()]
    return found


def sweep_table(points: Sequence[Setting]) -> Table:
    """Gain, cost, parameters, time and memory of every setting: means over seeds, intervals of the paired change."""
    found = _checks(points)
    body: list[list[Cell | str]] = []
    for point in points:
        row: list[Cell | str] = [
            Cell(point.name, f"{len(point.runs)} seed{'s' if len(point.runs) > 1 else ''}{_ref(point)}"),
            f"{point.mean('trainable'):,.0f}",
            f"{point.mean('learning_rate'):.2g}",
        ]
        row += [_check_cell(what, point.checks(what)) for what in found]
        row += [
            f"{point.mean('loss_last'):.3f}",
            duration(point.mean("seconds")),
            rate(point.mean("tokens_per_second")),
            size(max((run["peak_memory_bytes"] for run in point.runs if run["peak_memory_bytes"]), default=None)),
        ]
        body.append(row)
    columns = ("Method", "#Trained parameters", "#Learning rate", *(f"#{_title(what)}" for what in found), "#Last loss",
               "#Time", "#Tokens/s", "#Peak memory")  # fmt: skip
    return filled(make_table("methods", columns, body))


def sweep_panels(points: Sequence[Setting]) -> list[Panel]:
    """Return one panel of changes per quantity of the check: mean over seeds, its interval, and a dot for each seed."""
    panels = []
    for what in _checks(points):
        bars, better = [], "higher"
        scale, unit = (100.0, " points") if _is_share(what) else (1.0, "")
        for point in points:
            rows = point.checks(what)
            if rows:
                low, high, change = (fmean(float(row[key]) for row in rows) for key in ("low95", "high95", "change"))
                better = rows[0]["better"]
                text = _change(what, change)
                tip = f"{point.name}\n{_title(what)}: {text}, 95 % {_change(what, low)} to {_change(what, high)}"
                dots = tuple(float(row["change"]) for row in rows) if len(rows) > 1 else ()
                bars.append(
                    Interval(point.name, low, high, change, text + unit, tip, _verdict(low, high, better), dots)
                )
        note = "change in training" + ("" if better == "higher" else "; lower is better")
        panel = make_panel(_title(what), note, bars, scale, flip=better == "lower")
        if panel is not None:
            panels.append(panel)
    return panels


def _checks(points: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(what for point in points for run in point.runs for what in run["check"]))


def _check_cell(what: str, rows: Sequence[dict[str, Any]]) -> Cell:
    if not rows:
        return Cell("–")
    change, low, high = (_change(what, fmean(float(row[key]) for row in rows)) for key in ("change", "low95", "high95"))
    after = fmean(float(row["after"]) for row in rows)
    ends = [fmean(float(row[key]) for row in rows) for key in ("low95", "high95")]
    style = _verdict(ends[0], ends[1], rows[0]["better"])
    shown = f"{100 * after:.1f} %" if _is_share(what) else show("perplexity", after)
    return Cell(shown, f"{change} ({low} to {high}), n = {rows[0]['n']:,}", "" if style == "open" else style)


def _verdict(low: float, high: float, better: str) -> str:
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (better == "higher") else "worse"


def _change(what: str, value: float) -> str:
    text = f"{100 * value:+.1f}" if _is_share(what) else f"{value:+.{2 if abs(value) >= 0.1 else 3}f}"
    return text.replace("-", "−")


def _is_share(what: str) -> bool:
    return what.partition(":")[0] in ("accuracy", "task")


def _title(what: str) -> str:
    name, _, task = what.partition(":")
    words = {"accuracy": "accuracy", "task": "accuracy", "answer_loss": "loss of solutions, nats", "text": "perplexity"}
    title = words.get(name, name.replace("_", " "))
    return f"{task_info(task or 'text_sample').title}, {title}"


def _ref(point: Setting) -> str:
    return reference([point.source.number])
