"""Scores: every (model, task, metric) of the evaluate and solve records, with its interval and its items."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

from mambacus.reporting.formats import number
from mambacus.reporting.metrics import TASKS, metric_kind, plain_metric
from mambacus.reporting.sources import Source
from mambacus.runtime.errors import UserError
from mambacus.runtime.stats import wilson

Key = tuple[str, str]  # (task, metric)


@dataclasses.dataclass(frozen=True)
class Score:
    """One model on one metric of one task.

    Attributes:
        label: the model's name.
        task: the task or bench.
        metric: lm_eval's metric key without an empty filter, or ``accuracy`` for solve.
        value: the score, in the metric's own unit; shares lie in [0, 1].
        low: lower end of the 95 % interval (Wilson for shares, value - 1.96 standard errors otherwise), or None.
        high: its upper end, or None.
        n: items behind it.
        higher_is_better: the metric's direction.
        source: the record it was read from.
    """

    label: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool
    source: Source

    @property
    def key(self) -> Key:
        """(task, metric)."""
        return self.task, self.metric


def is_part(task: str) -> bool:
    """Return whether ``task`` is a part of a bench (``wordproblems:2 steps``): drawn, but not tested on its own."""
    return ":" in task


class Scores:
    """All scores of a set of records, found by model and (task, metric)."""

    def __init__(self, sources: Iterable[Source]) -> None:
        """Read the scores.

        Raises:
            UserError: two records give the same metric of the same task for one model, so it is open which counts.
        """
        self._scores: dict[tuple[str, str, str], Score] = {}
        for source in sources:
            for score in _read(source):
                place = (score.label, *score.key)
                if place in self._scores:
                    other = self._scores[place].source.path
                    raise UserError(
                        f"{score.task} of {score.label!r} is in two records, {other} and {source.path}: give only one"
                    )
                self._scores[place] = score

    @property
    def labels(self) -> list[str]:
        """The models, in the order their records were given."""
        return list(dict.fromkeys(label for label, _, _ in self._scores))

    @property
    def keys(self) -> list[Key]:
        """Every (task, metric): known tasks in the catalogue's order, then others by first appearance."""
        order = {name: place for place, name in enumerate(TASKS)}
        seen = dict.fromkeys((task, metric) for _, task, metric in self._scores)
        return sorted(seen, key=lambda key: order.get(key[0].partition(":")[0], len(order)))

    def get(self, label: str, key: Key) -> Score | None:
        """Return the score of one model on one metric, or None if it was not measured."""
        return self._scores.get((label, *key))

    def items(self, label: str, key: Key) -> dict[Hashable, Any]:
        """Return item id -> item value of one score; empty when no item-level outputs were saved."""
        score = self.get(label, key)
        return _items(score) if score else {}


def _read(source: Source) -> list[Score]:
    record = source.record
    if record.kind == "evaluate":
        return [
            _evaluated(source, task, plain_metric(metric), cell)
            for task, cells in record.results["tasks"].items()
            for metric, cell in cells.items()
            if number(cell["value"]) is not None
        ]
    if record.kind == "solve":
        benches = record.results["benches"]
        return [
            score for bench in benches for score in (_solved(source, bench, benches[bench]), *_parts(source, bench))
        ]
    return []


def _solved(source: Source, bench: str, cell: dict[str, Any]) -> Score:
    low, high = (float(end) for end in cell["wilson95"])
    value, n = float(cell["accuracy"]), int(cell["n"])
    return Score(source.label, bench, "accuracy", value, low, high, n, True, source)


def _parts(source: Source, bench: str) -> list[Score]:
    """Return one score per group of a bench's items (problems of equally many steps), where items name a group."""
    groups: dict[str, list[bool]] = {}
    for row in source.items:
        if row["bench"] == bench and row.get("group"):
            groups.setdefault(str(row["group"]), []).append(bool(row["correct"]))
    scores = []
    for group, right in sorted(groups.items()):
        low, high = wilson(sum(right), len(right))
        share = sum(right) / len(right)
        scores.append(Score(source.label, f"{bench}:{group}", "accuracy", share, low, high, len(right), True, source))
    return scores


def _evaluated(source: Source, task: str, metric: str, cell: dict[str, Any]) -> Score:
    value, n, stderr = float(cell["value"]), int(cell["n"]), number(cell.get("stderr"))
    low: float | None = None
    high: float | None = None
    if metric_kind(metric) == "share" and n:
        low, high = wilson(round(value * n), n)
    elif stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    return Score(source.label, task, metric, value, low, high, n, bool(cell["higher_is_better"]), source)


def _items(score: Score) -> dict[Hashable, Any]:
    rows = score.source.items
    if score.source.record.kind == "solve":
        bench, _, part = score.task.partition(":")
        answers: dict[Hashable, list[float]] = {}
        for row in rows:
            if row["bench"] == bench and part in ("", row.get("group")):
                # the question is part of the key: equal ids of differently seeded problems must never be paired
                answers.setdefault((row["id"], row["question"]), []).append(float(row["correct"]))
        return {key: sum(values) / len(values) for key, values in answers.items()}
    found: dict[Hashable, Any] = {}
    for row in rows:
        if row["task"] == score.task:
            values = {plain_metric(name): value for name, value in row["metrics"].items()}
            if score.metric in values:
                found[row["doc_id"]] = values[score.metric]
    return found
