"""The radar's geometry: every axis oriented so that outward is better, with its transform in words.

Shares and correlations: linear, from what guessing scores (centre) to a round value at or above the best model (rim);
the span is at least `MIN_SPAN`, so that noise is not magnified. Perplexities: logarithmic and inverted, from a round
value above the worst model (centre) to one at or below the best (rim); the ratio is at least `MIN_RATIO` and at most
`MAX_RATIO`. A value outside its axis is drawn at the centre and named on the page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mambacus.reporting.formats import axis_end
from mambacus.reporting.metrics import chance_level, main_metrics, metric_kind, metric_title, task_title
from mambacus.reporting.published import NOTHING, Published
from mambacus.reporting.scores import Key, Score, Scores, is_part

MIN_SPAN = 0.2
MIN_RATIO = 2.0
MARGIN = 1.25  # keeps the worst model off the centre, which stands for no particular perplexity
MAX_RATIO = 1000.0
MIN_AXES = 3
FEW_AXES = 5
LINEAR, LOG, LINEAR_DOWN = "linear", "inverted log", "inverted linear"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spoke.

    Attributes:
        task: the task.
        metric: its metric.
        scale: ``linear``, ``inverted log`` or ``inverted linear``.
        inner: value at the centre.
        outer: value at the rim.
        rings: values where grid rings cross this spoke, at equal distances outward.
    """

    task: str
    metric: str
    scale: str
    inner: float
    outer: float

    @property
    def key(self) -> Key:
        """(task, metric)."""
        return self.task, self.metric

    @property
    def title(self) -> str:
        """The task's name."""
        return task_title(self.task, self.metric)

    @property
    def subtitle(self) -> str:
        """The metric in words."""
        return metric_title(self.metric)

    @property
    def ends(self) -> str:
        """Centre and rim, for example ``25 % → 60 %``."""
        return f"{axis_end(self.metric, self.inner)} → {axis_end(self.metric, self.outer)}"

    @property
    def transform(self) -> str:
        """The transform in words."""
        return f"{self.scale}, {self.ends}"

    def position(self, value: float) -> float:
        """Return how far out ``value`` lies: 0 at the centre, 1 at the rim, clipped; NaN lies at the centre."""
        if math.isnan(value):
            return 0.0
        if self.scale == LOG:
            if value <= 0:
                return 1.0
            place = math.log(self.inner / value) / math.log(self.inner / self.outer) if value < math.inf else 0.0
        else:
            place = (value - self.inner) / (self.outer - self.inner)
        return min(1.0, max(0.0, place))

    def value_at(self, place: float) -> float:
        """Return the value drawn at ``place`` (0 centre, 1 rim)."""
        if self.scale == LOG:
            return self.inner * (self.outer / self.inner) ** place
        return self.inner + place * (self.outer - self.inner)

    def holds(self, value: float) -> bool:
        """Return whether ``value`` lies on the axis (otherwise it is drawn at an end of it)."""
        low, high = sorted((self.inner, self.outer))
        return low <= value <= high


def axes(scores: Scores, labels: Sequence[str], published: Published = NOTHING) -> list[Axis]:
    """Return one spoke per main metric that a model was scored on; published figures lie on it too."""
    result = []
    for key in radar_keys(scores):
        found = [score for label in labels if (score := scores.get(label, key)) is not None]
        if found:
            printed = [value for label in labels if (value := published.get(label, key)) is not None]
            result.append(make_axis(key, found, printed))
    return result


def radar_keys(scores: Scores) -> list[Key]:
    """Return the (task, metric) pairs that speak for their task.

    A bench whose items fall into groups is drawn as its groups when few other axes stand beside it, else as one axis.
    """
    keys = [
        (task, metric)
        for task, metric in scores.keys
        if metric in main_metrics(task, [m for t, m in scores.keys if t == task])
    ]
    split = {task.partition(":")[0] for task, _ in keys if is_part(task)}
    if sum(task not in split and not is_part(task) for task, _ in keys) < FEW_AXES:
        return [key for key in keys if key[0] not in split]
    return [key for key in keys if not is_part(key[0])]


def make_axis(key: Key, scores: Sequence[Score], others: Sequence[float] = ()) -> Axis:
    """Return the spoke that holds ``scores`` of one metric and ``others`` (published values of it), outward better."""
    task, metric = key
    values = [value for value in (*(score.value for score in scores), *others) if math.isfinite(value)]
    kind = metric_kind(metric)
    if kind == "perplexity" or (not scores[0].higher_is_better and values and min(values) > 0):
        return _log_axis(task, metric, [value for value in values if value > 0] or [1.0])
    if not scores[0].higher_is_better:
        span = max(map(abs, values), default=1.0) or 1.0
        return Axis(task, metric, LINEAR_DOWN, span, -span)
    inner = chance_level(task, metric)
    return Axis(task, metric, LINEAR, inner, _rim(inner, max(values, default=0.0), kind))


def _rim(inner: float, best: float, kind: str) -> float:
    """Return the smallest round value at or above ``best`` that is at least MIN_SPAN beyond ``inner``."""
    wanted = max(best, inner + MIN_SPAN)
    step = 0.1 if kind in ("share", "correlation") else 10.0 ** math.floor(math.log10(wanted))
    rim = round(step * math.ceil(round(wanted / step, 9)), 9)
    return min(1.0, rim) if kind in ("share", "correlation") else rim


def _log_axis(task: str, metric: str, values: list[float]) -> Axis:
    outer = _round_down(min(values))
    inner = min(_round_up(MARGIN * max(values)), outer * MAX_RATIO)
    if inner < outer * MIN_RATIO:
        inner = outer * MIN_RATIO
    return Axis(task, metric, LOG, inner, outer)


def _round_down(value: float) -> float:
    """Return the largest number of two leading digits at or below ``value``."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return step * math.floor(round(value / step, 9))


def _round_up(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return step * math.ceil(round(value / step, 9))
