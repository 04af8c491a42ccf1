"""Efficiency over sequence length: what ``mambacus bench lengths`` measured, with the lengths where curves cross."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mambacus.reporting.charts import Chart, Crossing, Figure, Series, Value, make_chart
from mambacus.reporting.formats import energy, finite, fixed, milliseconds, rate, reference, size
from mambacus.reporting.scales import log_scale, steps_scale
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.speed import CURVE_LENGTHS, Timing
from mambacus.reporting.table import Cell, Table, make_table


@dataclasses.dataclass(frozen=True)
class Metric:
    """One quantity over length.

    Attributes:
        key: its key in the rows.
        title: its name.
        text: a value in words.
        crossing: the quantity whose crossings are its own.
        base: its axis has ticks at powers of this.
    """

    key: str
    title: str
    text: Callable[[Any], str]
    crossing: str
    base: int = 10


METRICS = (
    Metric("median_ms", "Time", milliseconds, "tokens_per_second"),
    Metric("tokens_per_second", "Tokens per second", rate, "tokens_per_second"),
    Metric("peak_memory_bytes", "Peak memory", size, "peak_memory_bytes", base=2),
    Metric("state_bytes", "State or key-value cache", size, "state_bytes", base=2),
    Metric("energy_joules", "Energy", energy, "energy_joules"),
)
CASE = ("benchmark", "model", "dtype", "batch", "method", "new_tokens")  # what a figure holds fixed beside the record


def efficiency_figures(rows: Sequence[Timing]) -> list[Figure]:
    """Return one figure per record and case that was measured at several lengths."""
    groups: dict[tuple[Any, ...], list[Timing]] = {}
    for one in rows:
        groups.setdefault((one.source.number, *(one.row.get(key) for key in CASE)), []).append(one)
    colours = _colours(rows)
    return [
        _figure(members, colours)
        for members in groups.values()
        if len({one.row["seqlen"] for one in members}) >= CURVE_LENGTHS
    ]


def _colours(rows: Sequence[Timing]) -> dict[str, int]:
    """Return a colour per implementation, ours first: eager and graph share it and differ in the dashes."""
    names = sorted({str(one.row["implementation"]) for one in rows}, key=lambda name: (name != "mambacus", name))
    return {name: 1 + place % 7 for place, name in enumerate(names)}


def _figure(rows: Sequence[Timing], colours: dict[str, int]) -> Figure:
    source, row = rows[0].source, rows[0].row
    found = [crossing for crossing in crossovers(source) if _belongs(crossing, row)]
    charts = [chart for metric in METRICS if (chart := _chart(metric, rows, colours, found)) is not None]
    parts = [f"{row['model']}", f"batch {row['batch']}", str(row["dtype"])]
    parts += ["LoRA"] if row.get("method") == "lora" else []
    parts += [f"{row['new_tokens']} new tokens"] if row.get("new_tokens") else []
    title = f"{row['benchmark'].capitalize()}: {', '.join(parts)}"
    return Figure(f"{title} {source.number}", title, tuple(charts), (source.number,))


def _belongs(crossing: dict[str, Any], row: dict[str, Any]) -> bool:
    """Return whether a crossing is one of a row's figure; older records do not say of how many new tokens it is."""
    return all(crossing[key] == row.get(key) for key in _SHARED if key in crossing)


def _chart(
    metric: Metric, rows: Sequence[Timing], colours: dict[str, int], crossings: Sequence[dict[str, Any]]
) -> Chart | None:
    names = dict.fromkeys((one.who, str(one.row["implementation"]), bool(one.row.get("graph"))) for one in rows)
    series = [
        _series(metric, who, colours[name], graph, [one for one in rows if one.who == who])
        for who, name, graph in names
    ]
    values = [value.y for one in series for value in one.values]
    if not values:
        return None
    if any(one.failures for one in series):  # room for their crosses
        values.append(max(values) * max(max(values) / min(values), 2.0) ** 0.15)
    across = steps_scale((one.row["seqlen"] for one in rows), lambda value: f"{value:,.0f}")
    marks = [_mark(c, metric) for c in crossings if c["metric"] == metric.crossing and finite(c["seqlen"])]
    return make_chart(
        metric.title, ("tokens", across), ("", log_scale(values, metric.text, base=metric.base)), series, marks
    )


def _mark(crossing: dict[str, Any], metric: Metric) -> Crossing:
    at = f"{crossing['seqlen']:,.0f}"
    mode = ", both as graphs" if crossing["graph"] else ""
    tip = f"{metric.title}: {crossing['ours']} and {crossing['peer']}{mode} are equal at about {at} tokens"
    return Crossing(float(crossing["seqlen"]), f"equal at {at}", tip)


def _series(metric: Metric, who: str, colour: int, graph: bool, rows: Sequence[Timing]) -> Series:
    values, failures = [], []
    for one in sorted(rows, key=lambda timing: timing.row["seqlen"]):
        length, value = one.row["seqlen"], finite(one.row.get(metric.key))
        if one.row.get("error"):
            failures.append((float(length), f"{who}\n{length:,} tokens: {one.row['error']}"))
        elif value is not None and value > 0:
            values.append(Value(length, value, f"{who}\n{length:,} tokens: {metric.text(value)}"))
    return Series(who, colour, tuple(values), tuple(failures), dashed=graph)


def crossovers(source: Source) -> list[dict[str, Any]]:
    """Return a record's crossings.

    Each is ``{benchmark, batch, dtype, method, new_tokens, graph, metric, ours, peer, seqlen, note}``; ``seqlen`` is
    None where the curves do not cross.
    """
    found: list[dict[str, Any]] = source.record.results.get("crossovers", [])
    return found


def crossover_table(sources: Sequence[Source]) -> Table:
    """From which length on which side is ahead, for every quantity; where nothing crosses, that is said."""
    titles = {metric.key: metric.title for metric in METRICS}
    body: list[list[Cell | str]] = [
        [
            Cell(titles.get(c["metric"], c["metric"]), f"{_what(c)}{reference([source.number])}"),
            f"{c['batch']:,}",
            str(c["dtype"]) + (", LoRA" if c["method"] == "lora" else ""),
            "graph" if c["graph"] else "eager",
            str(c["ours"]),
            str(c["peer"]),
            "none" if c["seqlen"] is None else fixed(c["seqlen"], ",.0f"),
            str(c["note"]),
        ]
        for source in of_kind(sources, "bench")
        for c in crossovers(source)
    ]
    columns = ("Quantity", "#Batch", "dtype", "Mode", "Ours", "Peer", "#Equal at, tokens", "Who is ahead")
    return make_table("crossovers", columns, body, title="Where the curves cross", about=_CROSSING)


def _what(crossing: dict[str, Any]) -> str:
    tokens = crossing.get("new_tokens")
    return f"{crossing['benchmark']}, {tokens} new tokens" if tokens else str(crossing["benchmark"])


_SHARED = ("benchmark", "batch", "dtype", "method", "new_tokens")
_CROSSING = (
    "Interpolated between measured lengths on logarithmic axes; “none” means that one side leads at every length that "
    "both finished."
)
