"""Plot geometry: records -> plain numbers that the page draws as SVG and `figures` draws as PNG.

The page's plots are inline SVG instead of a plotting library: some kilobytes instead of 4.8 MB of plotly, one drawing
that follows light, dark and print, text that stays readable on a phone (labels are HTML over the shapes), and nothing
to execute before it shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mambacus.reporting.compare import Comparison
from mambacus.reporting.formats import number, show
from mambacus.reporting.metrics import FAMILIES, family_title, metric_title, task_info, task_title
from mambacus.reporting.radar import MIN_AXES, Axis, axes
from mambacus.reporting.scores import Score, Scores
from mambacus.reporting.sources import Source

RADIUS = 33.5  # of the rim, in percent of the square the radar is drawn in; the rest is for labels
RINGS = 4
HISTORY_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Mark:
    """One vertex: position in percent of the square, text on hover, and whether the value lies off its axis."""

    x: float
    y: float
    tip: str
    clipped: bool


@dataclasses.dataclass(frozen=True)
class Polygon:
    """One model on the radar; axes it was not scored on leave a gap (``closed`` is then False).

    ``values`` holds the raw values as text under ``"<task> <metric>"``.
    """

    label: str
    colour: int
    marks: tuple[Mark, ...]
    closed: bool
    values: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Spoke:
    """One axis with its rim point, and where its label stands."""

    axis: Axis
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


@dataclasses.dataclass(frozen=True)
class Radar:
    """A radar over tasks; ``notes`` name values that lie off their axis."""

    title: str
    spokes: tuple[Spoke, ...]
    rings: tuple[tuple[tuple[float, float], ...], ...]
    polygons: tuple[Polygon, ...]
    notes: tuple[str, ...]


def radar(title: str, scores: Scores, labels: Sequence[str], colours: dict[str, int]) -> Radar | None:
    """Return the radar of some models, or None when there are too few axes for a shape."""
    found = axes(scores, labels)
    if len(found) < MIN_AXES:
        return None
    turns = [2 * math.pi * place / len(found) for place in range(len(found))]
    spokes = tuple(_spoke(axis, turn) for axis, turn in zip(found, turns, strict=True))
    rings = tuple(tuple(_point(turn, RADIUS * ring / RINGS) for turn in turns) for ring in range(1, RINGS + 1))
    polygons, notes = [], []
    for label in labels:
        marks, values = [], {}
        for axis, turn in zip(found, turns, strict=True):
            score = scores.get(label, (axis.task, axis.metric))
            if score is None:
                continue
            values[f"{axis.task} {axis.metric}"] = show(axis.metric, score.value)
            clipped = not axis.holds(score.value)
            x, y = _point(turn, RADIUS * axis.position(score.value))
            marks.append(Mark(x, y, f"{label}\n{axis.title}: {describe(score)}", clipped))
            if clipped:
                side = "below chance" if axis.scale == "linear" else "worse than the axis reaches"
                notes.append(f"{label} on {axis.title}: {show(axis.metric, score.value)} ({side}, drawn at the centre)")
        if marks:
            polygons.append(Polygon(label, colours[label], tuple(marks), len(marks) == len(found), values))
    return Radar(title, spokes, rings, tuple(polygons), tuple(notes))


def describe(score: Score) -> str:
    """Return a score with its metric, interval and sample size in words."""
    text = f"{show(score.metric, score.value)} {metric_title(score.metric)}"
    if score.low is not None:
        text += f", 95 % {show(score.metric, score.low)} to {show(score.metric, score.high)}"
    return f"{text}, n = {score.n}"


def _spoke(axis: Axis, turn: float) -> Spoke:
    x, y = _point(turn, RADIUS)
    label_x, label_y = _point(turn, RADIUS + 2.5)
    side = math.sin(turn)
    anchor = "middle" if abs(side) < 0.2 else "start" if side > 0 else "end"
    if anchor == "middle":
        anchor = "top" if math.cos(turn) > 0 else "bottom"
    return Spoke(axis, x, y, label_x, label_y, anchor)


def _point(turn: float, radius: float) -> tuple[float, float]:
    """Return percent coordinates at an angle clockwise from twelve o'clock."""
    return round(50 + radius * math.sin(turn), 3), round(50 - radius * math.cos(turn), 3)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One interval on a panel's scale, in percent from the left; right is always better."""

    row: Comparison
    title: str
    low: float
    high: float
    middle: float
    text: str


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
    panels = []
    for family in FAMILIES:
        chosen = [row for row in rows if row.kind == "share" and task_info(row.task).family == family]
        panels.append(_panel(family_title(family), "change in percentage points", chosen, 100.0))
    panels.append(
        _panel(
            "Perplexity",
            "change in percent, lower is better: the axis is turned so that right is better",
            [row for row in rows if row.kind == "perplexity"],
            100.0,
        )
    )
    panels.append(_panel("Correlation", "change", [row for row in rows if row.kind == "correlation"], 1.0))
    return [panel for panel in panels if panel is not None]


def _panel(title: str, note: str, rows: Sequence[Comparison], scale: float) -> Panel | None:
    if not rows:
        return None
    flip = -1.0 if not rows[0].higher_is_better else 1.0
    ends = [flip * scale * value for row in rows for value in (row.low, row.high)]
    ends = [min(max(end, -1000.0 * scale), 1000.0 * scale) for end in ends]
    low, high, step = _nice_range(min([*ends, 0.0]), max([*ends, 0.0]))

    def place(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (flip * scale * value - low) / (high - low))), 2)

    bars = []
    for row in rows:
        left, right = sorted((place(row.low), place(row.high)))
        bars.append(Bar(row, task_title(row.task, row.metric), left, right, place(row.change), change_text(row)))
    count = round((high - low) / step)
    ticks = tuple((round(100 * index / count, 2), _tick(flip * (low + index * step))) for index in range(count + 1))
    return Panel(title, note, place(0.0), ticks, tuple(bars))


def change_text(row: Comparison) -> str:
    """Return a change with its unit: ``+3.1 points``, ``−0.8 %`` or ``+0.012``."""
    if row.kind == "share":
        text = f"{100 * row.change:+.1f} points"
    elif row.kind == "perplexity":
        text = f"{100 * row.change:+.1f} %" if row.change < 100 else f"× {row.after / row.before:.2g}"
    else:
        text = f"{row.change:+.3f}"
    return text.replace("-", "−")


def _nice_range(low: float, high: float, parts: int = 5) -> tuple[float, float, float]:
    """Return (low, high, step) of round numbers around [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9), step


def _tick(value: float) -> str:
    return f"{value:+.6g}".replace("-", "−") if abs(value) > 1e-12 else "0"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One training run: points in percent of the plot and the values behind them."""

    label: str
    colour: int
    path: str
    points: tuple[tuple[float, float, str], ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Training loss over steps: tick marks (percent, text) of both axes and one curve per run."""

    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def training_chart(runs: Sequence[tuple[Source, int]]) -> Chart | None:
    """Return the loss curves of training records given with their colours, or None without any history."""
    histories = [(source, colour, _history(source)) for source, colour in runs]
    histories = [entry for entry in histories if len(entry[2]) > 1]
    if not histories:
        return None
    steps = [step for *_, points in histories for step, _ in points]
    losses = [loss for *_, points in histories for _, loss in points]
    left, right, x_step = _nice_range(0.0, max(steps))
    right = float(max(steps))  # the curve ends at the edge; round ticks stand inside
    bottom, top, y_step = _nice_range(0.0 if min(losses) < 0.5 * max(losses) else min(losses), max(losses))

    def x(step: float) -> float:
        return round(100 * (step - left) / (right - left), 2)

    def y(loss: float) -> float:
        return round(100 * (top - loss) / (top - bottom), 2)

    curves = tuple(
        Curve(
            source.label,
            colour,
            "M" + "L".join(f"{x(step)} {y(loss)}" for step, loss in points),
            tuple((x(step), y(loss), _loss_tip(source, step, loss)) for step, loss in points),
        )
        for source, colour, points in histories
    )
    x_marks = tuple((x(value), f"{value:g}") for value in _steps(left, right, x_step))
    y_marks = tuple((y(value), f"{value:g}") for value in _steps(bottom, top, y_step))
    return Chart(x_marks, y_marks, curves)


def _steps(low: float, high: float, step: float) -> list[float]:
    return [round(low + index * step, 9) for index in range(int((high - low) / step + 1e-9) + 1)]


def _loss_tip(source: Source, step: float, loss: float) -> str:
    return f"{source.label}\nstep {step:g}: loss {loss:.4f}"


def _history(source: Source) -> list[tuple[float, float]]:
    """Return (step, loss) of a run, thinned evenly to at most HISTORY_POINTS."""
    points = []
    for row in source.record.results.get("history", []):
        loss = number(row.get("loss"))
        if loss is not None and math.isfinite(loss):
            points.append((float(row["step"]), loss))
    if len(points) <= HISTORY_POINTS:
        return points
    stride = (len(points) - 1) / (HISTORY_POINTS - 1)
    return [points[round(index * stride)] for index in range(HISTORY_POINTS)]
