"""Methods compared: what ``finetune --sweep`` records hold, one row and one bar per setting, over its seeds.

A sweep without checks of settings that another one checked lends it seconds and memory: runs that share a machine learn
the same but tell no time, so time is measured in a short sweep of its own. Beside a sweep that tells no time the
seconds of another one compare with nothing and are left out too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mambacus.reporting.formats import duration, fixed, rate, reference, show, size
from mambacus.reporting.metrics import task_info
from mambacus.reporting.panels import Interval, Panel, make_panel
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, filled, make_table

_SAME = ("model", "data", "batch_size", "grad_accum", "max_length", "pack_length", "checkpointing", "device", "dtype")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep's grid with its runs, which differ in the seed alone.

    Attributes:
        source: the sweep.
        name: the point without its seed.
        runs: one for each seed.
        costs: the same setting in a sweep of its own, run for time and memory alone.
    """

    source: Source
    name: str
    runs: tuple[dict[str, Any], ...]
    costs: Setting | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What is equal in two sweeps of the same training."""
        config = self.source.record.config
        return self.name, *(str(config.get(key)) for key in _SAME)

    @property
    def timed(self) -> Setting | None:
        """Whose seconds compare with those of others: runs that had the machine to themselves."""
        return next((one for one in (self.costs, self) if one and one._in_turn), None)

    @property
    def weighed(self) -> Setting | None:
        """Whose memory is that of the training, not of all that its process did before."""
        return next((one for one in (self.costs, self) if one and one._counted_anew), None)

    @property
    def _in_turn(self) -> bool:
        return bool(self.source.record.results.get("one_at_a_time", True))

    @property
    def _counted_anew(self) -> bool:
        return all(run.get("peak_memory_of") == "steps" for run in self.runs)

    def mean(self, key: str) -> float:
        """Return the mean of one figure over the runs."""
        return fmean(float(run[key]) for run in self.runs)

    def checks(self, what: str) -> list[dict[str, Any]]:
        """Return what the check found in each run: ``{before, after, change, low95, high95, n, better}``."""
        return [run["check"][what] for run in self.runs if what in run["check"]]


def settings(sources: Sequence[Source]) -> list[Setting]:
    """Return every setting of every sweep, in the order it was run; one that only lends its costs is none of them."""
    found = []
    for source in of_kind(sources, "sweep"):
        axes = [axis for axis in source.record.results["axes"] if axis != "seed"]
        groups: dict[str, list[dict[str, Any]]] = {}
        for run in source.record.results["runs"]:
            parts = [str(run[axis]) if axis == "method" else f"{axis.replace('_', ' ')} {run[axis]}" for axis in axes]
            groups.setdefault(", ".join(parts) or source.label, []).append(run)
        found += [Setting(source, name, tuple(runs)) for name, runs in groups.items()]
    bare = {point.identity: point for point in found if not _checks([point])}
    checked = {point.identity for point in found if _checks([point])}
    return [
        dataclasses.replace(point, costs=bare.get(point.identity) if point.identity in checked else None)
        for point in found
        if _checks([point]) or point.identity not in checked
    ]


def sweep_table(points: Sequence[Setting]) -> Table:
    """Gain, cost, parameters, time and memory of every setting: means over seeds, intervals of the paired change.

    The first row of a sweep is its base before training.
    """
    found = _checks(points)
    body: list[list[Cell | str]] = []
    for place, point in enumerate(points):
        if _checks([point]) and (place == 0 or points[place - 1].source != point.source):
            body.append(_base_row([one for one in points if one.source == point.source], found))
        row: list[Cell | str] = [
            Cell(point.name, f"{len(point.runs)} seed{'s' if len(point.runs) > 1 else ''}{_ref(point)}"),
            fixed(point.mean("trainable"), ",.0f"),
            fixed(point.mean("learning_rate"), ".2g"),
        ]
        row += [_check_cell(what, point.checks(what)) for what in found]
        row += [fixed(point.mean("loss_last"), ".3f"), *_cost_cells(point, _compared(point, points))]
        body.append(row)
    columns = ("Method", "#Trained parameters", "#Learning rate", *(f"#{_title(what)}" for what in found), "#Last loss",
               "#Time", "#Tokens/s", "#Peak memory")  # fmt: skip
    return filled(make_table("methods", columns, body))


def sweep_notes(points: Sequence[Setting]) -> tuple[str, ...]:
    """Return why the table lacks time or memory of some settings."""
    shared = sorted({point.source.number for point in points if point.timed is None})
    lone = sorted({point.source.number for point in points if point.timed and not _compared(point, points)})
    whole = sorted({point.source.number for point in points if point.weighed is None})
    notes = []
    if shared:
        notes.append(f"Time is left out{reference(shared)}: runs were at work at the same time and shared the machine.")
    if lone:
        notes.append(f"Time is left out{reference(lone)}: it would be compared with nothing, since others tell none.")
    if whole:
        notes.append(f"Memory is left out{reference(whole)}: the peak is that of a process that ran several trainings.")
    return tuple(notes)


def _base_row(points: Sequence[Setting], found: Sequence[str]) -> list[Cell | str]:
    """Return what the check found before training, where that is the same for all points of a sweep."""
    source = points[0].source
    base = str(source.record.config.get("model") or source.label)
    cells = []
    for what in found:
        before = {float(row["before"]) for point in points for row in point.checks(what)}
        cells.append(Cell(_value(what, before.pop()) if len(before) == 1 else "–"))
    return [Cell(Path(base).name, f"before training{_ref(points[0])}"), "–", "–", *cells, *["–"] * 4]


def _compared(point: Setting, points: Sequence[Setting]) -> Setting | None:
    """Return whose seconds stand in the table: those of a sweep for costs, or its own if all settings have some."""
    return point.timed if point.timed is not point or all(one.timed for one in points) else None


def _cost_cells(point: Setting, timed: Setting | None) -> list[Cell | str]:
    """Return time, speed and memory; from a sweep for costs alone with its number."""
    weighed = point.weighed
    cells: list[Cell | str] = ["–", "–", "–"]
    if timed is not None:
        note = "" if timed is point else _ref(timed).strip()
        cells[:2] = [Cell(duration(timed.mean("seconds")), note), rate(timed.mean("tokens_per_second"))]
    if weighed is not None:
        peak = max(run["peak_memory_bytes"] for run in weighed.runs)
        cells[2] = Cell(size(peak), "" if weighed is point else _ref(weighed).strip())
    return cells


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
    note = f"{change}, 95 % {low} to {high}"
    if len(rows) > 1:
        seeds = [float(row["after"]) for row in rows]
        note += f"; seeds {_value(what, min(seeds))} to {_value(what, max(seeds))}"
    return Cell(_value(what, after), f"{note}; n = {rows[0]['n']:,}", "" if style == "open" else style)


def _value(what: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if _is_share(what):
        return f"{100 * value:.1f} %"
    return f"{value:#.3g}" if what.startswith("answer_loss") else show("perplexity", value)


def _verdict(low: float, high: float, better: str) -> str:
    if low <= 0 <= high or not (math.isfinite(low) and math.isfinite(high)):
        return "open"
    return "better" if (low > 0) == (better == "higher") else "worse"


def _change(what: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
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
