"""Curves over a number: geometry that the page draws as SVG and `figures` draws as PNG and SVG files.

One mechanism for training losses, efficiency over sequence length and controlled studies: series of values become
points in percent of the plot with the raw values as text; failures and crossings are marks of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from mambacus.reporting.formats import finite
from mambacus.reporting.scales import Scale, linear_scale
from mambacus.reporting.sources import Source

HISTORY_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Value:
    """One measured value: where, how much, the words on hover, and the ends of its interval."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """What one curve is made of; ``failures`` are (x, words) where there is no value, such as out of memory.

    A value that is not finite is a failure too: no axis has a place for it.
    """

    label: str
    colour: int
    values: tuple[Value, ...]
    failures: tuple[tuple[float, str], ...] = ()
    dashed: bool = False
    dots: bool = True


@dataclasses.dataclass(frozen=True)
class Point:
    """A value in percent of the plot, from the left and from the top; ``span`` is its interval (top, bottom)."""

    x: float
    y: float
    tip: str
    span: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Curve:
    """One drawn series; ``crosses`` are its failures, at the upper edge."""

    label: str
    colour: int
    points: tuple[Point, ...]
    crosses: tuple[Point, ...]
    dashed: bool
    dots: bool

    @property
    def path(self) -> str:
        """The SVG path through the points."""
        return "M" + "L".join(f"{point.x} {point.y}" for point in self.points) if self.points else ""


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A length to mark: percent from the left (a value before it is placed), a short text and the words on hover."""

    x: float
    text: str
    tip: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """One plot: names of both axes, ticks (percent, text), curves and crossings."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]
    crossings: tuple[Crossing, ...] = ()

    @property
    def hover(self) -> list[tuple[str, float, float, str]]:
        """(label, x, y, words) of everything a pointer can come near to."""
        return [
            (curve.label, point.x, point.y, point.tip)
            for curve in self.curves
            for point in curve.points + curve.crosses
        ]


@dataclasses.dataclass(frozen=True)
class Figure:
    """Plots that share one legend.

    Attributes:
        name: used for files.
        title: heading.
        charts: the plots.
        numbers: the records they were read from.
        notes: sentences beside them.
    """

    name: str
    title: str
    charts: tuple[Chart, ...]
    numbers: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> list[tuple[str, int, bool]]:
        """The legend: (label, colour, dashed) of every curve, once."""
        return list(dict.fromkeys((c.label, c.colour, c.dashed) for chart in self.charts for c in chart.curves))


def make_chart(
    title: str,
    x: tuple[str, Scale],
    y: tuple[str, Scale],
    series: Sequence[Series],
    crossings: Sequence[Crossing] = (),
) -> Chart:
    """Place the series on two axes.

    Args:
        title: name of the plot.
        x: name and scale of the horizontal axis.
        y: name and scale of the vertical axis.
        series: what is drawn.
        crossings: what to mark, at values of the horizontal axis.
    """
    across, up = x[1], y[1]

    def down(value: float) -> float:
        return round(100 - up.place(value), 2)

    curves, failed = [], 0
    for one in series:
        placed = [value for value in one.values if math.isfinite(value.x)]
        points = tuple(
            Point(across.place(value.x), down(value.y), value.tip, _span(value, down))
            for value in placed
            if math.isfinite(value.y)
        )
        broken = [(value.x, f"{value.tip} (not finite)") for value in placed if not math.isfinite(value.y)]
        failures = [failure for failure in (*one.failures, *broken) if math.isfinite(failure[0])]
        crosses = tuple(Point(across.place(at), 4.0 + 9.0 * failed, words) for at, words in failures)
        failed += bool(crosses)  # crosses of several series at one length stand under each other
        curves.append(Curve(one.label, one.colour, points, crosses, one.dashed, one.dots))
    marks = tuple(dataclasses.replace(mark, x=across.place(mark.x)) for mark in crossings if math.isfinite(mark.x))
    return Chart(title, x[0], y[0], across.x_ticks, up.y_ticks, tuple(curves), marks)


def _span(value: Value, down: Callable[[float], float]) -> tuple[float, float] | None:
    low, high = finite(value.low), finite(value.high)
    return None if low is None or high is None else (down(high), down(low))


def training_figure(runs: Sequence[tuple[Source, int]]) -> Figure | None:
    """Return the loss curves of training records given with their colours, or None without any history."""
    series = [_losses(source, colour) for source, colour in runs]
    left_out = [
        f"{source.label}: {broken:,} of {len(history):,} losses are not finite and left out."
        for source, _ in runs
        if (history := source.record.results.get("history", []))
        and (broken := sum(finite(row.get("loss")) is None for row in history))
    ]
    series = [one for one in series if len(one.values) > 1]
    if not series:
        return None
    losses = [value.y for one in series for value in one.values]
    steps = linear_scale((value.x for one in series for value in one.values), _plain, zero=True, tight=True)
    up = linear_scale(losses, _plain, zero=min(losses) < 0.5 * max(losses))
    chart = make_chart("Loss", ("optimiser steps", steps), ("nats a token", up), series)
    return Figure("training", "Training loss", (chart,), tuple(source.number for source, _ in runs), tuple(left_out))


def _losses(source: Source, colour: int) -> Series:
    """Return the losses of a run, thinned evenly to at most HISTORY_POINTS."""
    values = []
    for row in source.record.results.get("history", []):
        loss, step = finite(row.get("loss")), finite(row["step"])
        if loss is not None and step is not None:
            values.append(Value(step, loss, f"{source.label}\nstep {step:g}: loss {loss:.4f}"))
    if len(values) > HISTORY_POINTS:
        stride = (len(values) - 1) / (HISTORY_POINTS - 1)
        values = [values[round(index * stride)] for index in range(HISTORY_POINTS)]
    return Series(source.label, colour, tuple(values), dots=False)


def _plain(value: float) -> str:
    return f"{value:g}"
