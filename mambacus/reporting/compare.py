"""Before against after, item by item: difference, interval, test, and the sentence the sample allows.

Shares of items right: exact McNemar test; interval of the difference by Bonett and Price 2012 (adjusted Wald), which
keeps its width when no item changed, where a bootstrap would collapse to zero. Perplexity and Matthews' correlation:
paired bootstrap interval and paired swap test. Holm's correction runs over all tests of one pair of models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mambacus.reporting.metrics import main_metrics, metric_kind, metric_title, task_info
from mambacus.reporting.scores import Key, Scores, is_part
from mambacus.runtime.stats import FloatArray, holm, matthews, mcnemar_exact, mean, paired_bootstrap

ALPHA = 0.05
SMALL_SAMPLE = 100
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One metric of one task, before against after, on the items both models saw.

    Attributes:
        base: label before.
        tuned: label after.
        task: the task.
        metric: its metric.
        kind: ``share``, ``perplexity``, ``correlation`` or ``other``.
        n: items both models saw.
        before: the score of ``base`` on those items.
        after: the score of ``tuned`` on those items.
        change: ``after - before``; for a perplexity the relative change ``after / before - 1``.
        low: lower end of the 95 % interval of ``change``.
        high: its upper end.
        gained: items only ``tuned`` has right (shares only, else None).
        lost: items only ``base`` has right (shares only, else None).
        p: p-value of the test.
        p_adjusted: after Holm's correction over all comparisons of this pair.
        higher_is_better: the metric's direction.
        test: the test and the interval in words.
        of: items of the larger of the two runs, as their records count them; None where that was not kept.
        missing: a warning where an items file has not the number of items that its record names, else empty.
    """

    base: str
    tuned: str
    task: str
    metric: str
    kind: str
    n: int
    before: float
    after: float
    change: float
    low: float
    high: float
    gained: int | None
    lost: int | None
    p: float
    p_adjusted: float
    higher_is_better: bool
    test: str
    of: int | None = None
    missing: str = ""

    @property
    def key(self) -> Key:
        """(task, metric)."""
        return self.task, self.metric

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` when the adjusted p-value is below 0.05, else ``open``."""
        if self.p_adjusted >= ALPHA or self.change == 0:
            return "open"
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


@dataclasses.dataclass(frozen=True)
class Uncompared:
    """A metric of which no paired comparison can be made, and why."""

    task: str
    metric: str
    reason: str


def compare(scores: Scores, base: str, tuned: str) -> tuple[list[Comparison], list[Uncompared]]:
    """Compare two models on the metrics that speak for each task both were scored on."""
    rows: list[Comparison] = []
    left_out: list[Uncompared] = []
    for task, metric in scores.keys:
        present = [m for t, m in scores.keys if t == task]
        one, two = scores.get(base, (task, metric)), scores.get(tuned, (task, metric))
        if one is None or two is None or is_part(task) or metric not in main_metrics(task, present):
            continue
        before, after = scores.items(base, (task, metric)), scores.items(tuned, (task, metric))
        shared = [item for item in before if item in after]
        if shared:
            found = _compare_items(metric, [before[item] for item in shared], [after[item] for item in shared])
            seen = ((base, one.n, len(before)), (tuned, two.n, len(after)))
            found["of"] = max(one.n, two.n)
            found["missing"] = "; ".join(
                f"the items file of {label} has {items:,} of its record's {n:,} items"
                for label, n, items in seen
                if items != n
            )
            rows.append(
                Comparison(base, tuned, task, metric, higher_is_better=one.higher_is_better, p_adjusted=1.0, **found)
            )
        else:
            reason = "the two runs saw different items" if before and after else "no item-level outputs were saved"
            left_out.append(Uncompared(task, metric, reason))
    adjusted = holm([row.p for row in rows])
    return [dataclasses.replace(row, p_adjusted=p) for row, p in zip(rows, adjusted, strict=True)], left_out


def _compare_items(metric: str, before: list[Any], after: list[Any]) -> dict[str, Any]:
    kind = metric_kind(metric)
    one, two = _rows(before, kind), _rows(after, kind)
    if kind == "share" and np.isin(one, (0.0, 1.0)).all() and np.isin(two, (0.0, 1.0)).all():
        return _compare_shares(one[:, 0] > 0.5, two[:, 0] > 0.5) | {"kind": kind}
    statistics: dict[int, Callable[[FloatArray], float]] = {1: mean, 2: matthews if kind == "correlation" else _nats}
    statistic = statistics[one.shape[1]]
    interval = paired_bootstrap(one, two, statistic, iterations=RESAMPLES)
    ends = [interval.estimate, interval.low, interval.high]
    first, second = statistic(one), statistic(two)
    if kind == "perplexity":  # resampled as log-perplexity, shown as a ratio
        ends = [math.expm1(min(end, 700.0)) for end in ends]
        first, second = math.exp(min(first, 700.0)), math.exp(min(second, 700.0))
    return {
        "kind": kind,
        "n": len(one),
        "before": first,
        "after": second,
        "change": ends[0],
        "low": ends[1],
        "high": ends[2],
        "gained": None,
        "lost": None,
        "p": swap_test(one, two, statistic),
        "test": "paired swap test, paired bootstrap interval",
    }


def _compare_shares(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    low, high = paired_share_interval(gained, lost, n)
    return {
        "n": n,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": (gained - lost) / n,
        "low": low,
        "high": high,
        "gained": gained,
        "lost": lost,
        "p": mcnemar_exact(lost, gained),
        "test": "exact McNemar test, Bonett-Price interval",
    }


def paired_share_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired proportions.

    Args:
        gained: items right only after.
        lost: items right only before.
        n: all items.

    Source: Bonett and Price 2012, adjusted Wald interval (one item added to each kind of disagreement).
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def swap_test(
    before: FloatArray, after: FloatArray, statistic: Callable[[FloatArray], float], *, iterations: int = RESAMPLES
) -> float:
    """Return the two-sided p-value of a difference when each item's two outcomes are swapped at random.

    The smallest value it can return is ``1 / (iterations + 1)``.

    Args:
        before: (n, columns) one row per item.
        after: (n, columns) the same items.
        statistic: figure of one such array.
        iterations: random swaps; the seed is fixed.

    Source: Fisher's randomisation test for pairs; Noreen 1989, approximate randomisation.
    """
    random = np.random.default_rng(0)
    observed = abs(statistic(after) - statistic(before))
    reached = 0
    for _ in range(iterations):
        swap = random.random(len(before))[:, None] < 0.5
        difference = statistic(np.where(swap, before, after)) - statistic(np.where(swap, after, before))
        reached += abs(difference) >= observed * (1 - 1e-12)
    return (reached + 1) / (iterations + 1)


def conclusion(row: Comparison) -> str:
    """Return one sentence: what the items show, or how large a change they leave open."""
    what = f"{task_info(row.task).title}, {metric_title(row.metric)}"
    unit = {"share": " points", "perplexity": " %"}.get(row.kind, "")
    scale, digits = (100.0, 1) if unit else (1.0, 3)
    low, high, change = (f"{scale * value:+.{digits}f}".replace("-", "−") for value in (row.low, row.high, row.change))
    span = f"{change}{unit} (95 % interval {low} to {high})"
    if row.low == row.high == 0:
        text = f"{what}: both models gave the same outcome on every item"
    elif row.verdict == "open":
        size = scale * max(abs(row.low), abs(row.high))
        text = f"{what}: no difference is shown, {span}; changes up to {size:.{digits}f}{unit} stay possible"
    else:
        text = f"{what}: {row.verdict}, {span}"
    few = row.kind == "share" and row.n < SMALL_SAMPLE
    some = row.of is not None and row.of != row.n
    items = f"compared on the {row.n:,} common items of {row.of:,}" if some else f"{row.n:,} items"
    warning = f" Warning: {row.missing}." if row.missing else ""
    return f"{text}; {items}{', a smoke test rather than a measurement' if few else ''}.{warning}"


def _rows(values: list[Any], kind: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1 and kind == "perplexity":  # bare log-likelihoods: every item weighs the same
        return np.stack([array, np.ones_like(array)], axis=1)
    return array[:, None] if array.ndim == 1 else array


def _nats(rows: FloatArray) -> float:
    """Return the negative log-likelihood per unit of weight, in nats: the log of the perplexity."""
    return float(-rows[:, 0].sum() / rows[:, 1].sum())
