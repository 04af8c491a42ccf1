"""The radar as plain numbers that the page draws as SVG and `figures` draws as PNG and SVG files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mambacus.reporting.formats import show
from mambacus.reporting.metrics import metric_title
from mambacus.reporting.published import NOTHING, Published
from mambacus.reporting.radar import MIN_AXES, Axis, axes
from mambacus.reporting.scores import Score, Scores
from mambacus.reporting.table import Cell, Table, make_table

RADIUS = 33.5  # of the rim, in percent of the square the radar is drawn in; the rest is for labels
RINGS = 4


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

    ``published`` are marks of figures that others published for this model.
    """

    label: str
    colour: int
    marks: tuple[Mark, ...]
    closed: bool
    published: tuple[Mark, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spoke:
    """One axis with its rim point, and where its label stands."""

    axis: Axis
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str

    @property
    def room(self) -> float:
        """Percent of the square between the label and the edge it grows towards."""
        return round(self.label_x if self.anchor == "end" else 100 - self.label_x, 3)


@dataclasses.dataclass(frozen=True)
class Radar:
    """A radar over tasks with its raw values as a table; ``notes`` name values that lie off their axis."""

    title: str
    spokes: tuple[Spoke, ...]
    rings: tuple[tuple[tuple[float, float], ...], ...]
    polygons: tuple[Polygon, ...]
    values: Table
    notes: tuple[str, ...]

    @property
    def entries(self) -> list[tuple[str, int, bool]]:
        """The legend: (label, colour, dashed)."""
        return [(polygon.label, polygon.colour, False) for polygon in self.polygons]


def radar(
    title: str, scores: Scores, labels: Sequence[str], colours: dict[str, int], published: Published = NOTHING
) -> Radar | None:
    """Return the radar of some models, or None when there are too few axes for a shape."""
    found = axes(scores, labels, published)
    if len(found) < MIN_AXES:
        return None
    turns = [2 * math.pi * place / len(found) for place in range(len(found))]
    spokes = tuple(_spoke(axis, turn) for axis, turn in zip(found, turns, strict=True))
    rings = tuple(tuple(_point(turn, RADIUS * ring / RINGS) for turn in turns) for ring in range(1, RINGS + 1))
    made = [_polygon(label, colours[label], scores, spokes, turns, published) for label in labels]
    polygons = tuple(polygon for polygon in made if polygon.marks)
    notes = [note for label in labels for axis in found if (note := _off_axis(label, axis, scores))]
    if any(polygon.published for polygon in polygons):
        notes.append(f"Large hollow marks: published figures, not measured here ({published.short}).")
    values = _values(title, scores, [polygon.label for polygon in polygons], found, published)
    return Radar(title, spokes, rings, polygons, values, tuple(notes))


def _polygon(
    label: str, colour: int, scores: Scores, spokes: Sequence[Spoke], turns: Sequence[float], published: Published
) -> Polygon:
    marks, others = [], []
    for spoke, turn in zip(spokes, turns, strict=True):
        axis = spoke.axis
        score, printed = scores.get(label, axis.key), published.get(label, axis.key)
        if score is not None:
            x, y = _point(turn, RADIUS * axis.position(score.value))
            marks.append(Mark(x, y, f"{label}\n{axis.title}: {describe(score)}", not axis.holds(score.value)))
        if printed is not None:
            x, y = _point(turn, RADIUS * axis.position(printed))
            words = f"{show(axis.metric, printed)} {axis.subtitle}, published ({published.origins[(label, *axis.key)]})"
            others.append(Mark(x, y, f"{label}\n{axis.title}: {words}", not axis.holds(printed)))
    return Polygon(label, colour, tuple(marks), len(marks) == len(spokes), tuple(others))


def _off_axis(label: str, axis: Axis, scores: Scores) -> str:
    score = scores.get(label, axis.key)
    if score is None or axis.holds(score.value):
        return ""
    side = "below chance" if axis.scale == "linear" else "worse than the axis reaches"
    return f"{label} on {axis.title}: {show(axis.metric, score.value)} ({side}, drawn at the centre)"


def _values(title: str, scores: Scores, labels: Sequence[str], found: Sequence[Axis], published: Published) -> Table:
    body = []
    for axis in found:
        row = [Cell(axis.title, f"{axis.subtitle}; {axis.transform}".replace(" %", "\N{NO-BREAK SPACE}%"))]
        for label in labels:
            score = scores.get(label, axis.key)
            row.append(
                Cell(show(axis.metric, score.value if score else None), published_note(published, label, axis.key))
            )
        body.append(row)
    return make_table(f"radar {title}".strip(), ("Axis", *(f"#{label}" for label in labels)), body)


def published_note(published: Published, label: str, key: tuple[str, str]) -> str:
    """Return ``published 44.3 %`` for a model and metric that others published, else an empty text."""
    value = published.get(label, key)
    return "" if value is None else f"published {show(key[1], value)}"


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
