"""Statistics of evaluations, on scipy: Wilson, exact McNemar, paired bootstrap, clustered means, Holm, power.

Nothing here imports torch or the rest of the package, so evaluation (which measures) and reporting (which compares)
share it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]
AnswerT = TypeVar("AnswerT", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the unit of the statistic."""

    estimate: float
    low: float
    high: float


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) of a proportion; (0, 1) when nothing was counted.

    Args:
        correct: successes, 0 to ``n``.
        n: independent trials.
        level: confidence, between 0 and 1.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it for small ``n`` and extreme rates.
    """
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_before: int, only_after: int) -> float:
    """Return the two-sided exact p-value of McNemar's test on the items where two models disagree.

    Args:
        only_before: items only the first model got right.
        only_after: items only the second model got right.

    Source: McNemar 1947; the exact form is the sign test on the discordant pairs.
    """
    discordant = only_before + only_after
    return float(stats.binomtest(only_after, discordant, 0.5).pvalue) if discordant else 1.0


def paired_bootstrap(
    before: FloatArray,
    after: FloatArray,
    statistic: Callable[[FloatArray], float],
    *,
    iterations: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return ``statistic(after) - statistic(before)`` with a percentile interval; items are resampled in pairs.

    Args:
        before: (n, columns) one row per item of the first model.
        after: (n, columns) the same items, in the same order, of the second model.
        statistic: figure of one such array, for example `mean`, `perplexity`, `bits` or `matthews`.
        iterations: resamples.
        level: confidence, between 0 and 1.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: the arrays do not pair up, or hold no item.

    Source: Efron and Tibshirani 1993, percentile interval.
    """
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise ValueError(f"expected two (n, columns) arrays of the same items, got {before.shape} and {after.shape}")
    random = np.random.default_rng(seed)
    differences = np.empty(iterations)
    for iteration in range(iterations):
        rows = random.integers(0, len(before), len(before))
        differences[iteration] = statistic(after[rows]) - statistic(before[rows])
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(after) - statistic(before), float(low), float(high))


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95) -> Interval:
    """Return the mean of ``values`` with an interval that allows for items of one cluster being alike.

    The variance of the cluster sums, with the factor G / (G - 1) for G clusters, and Student's t with G - 1 degrees of
    freedom. With one cluster nothing is known of the spread between clusters: the interval is infinite.

    Args:
        values: one figure per item.
        clusters: the cluster of each item, for example its subject.
        level: confidence, between 0 and 1.

    Raises:
        ValueError: no item, or not one cluster for each.

    Source: Liang and Zeger 1986; Cameron and Miller 2015; Miller 2024 for evaluations of language models.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"expected a cluster for each of at least one value, got {len(values)} and {len(clusters)}")
    centre = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - centre
    count = len(sums)
    if count == 1:
        return Interval(centre, -math.inf, math.inf)
    variance = count / (count - 1) * sum(total**2 for total in sums.values()) / len(values) ** 2
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(variance)
    return Interval(centre, centre - half, centre + half)


def detectable_difference(n: int, disagreement: float, level: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest difference of two accuracies on the same ``n`` items that would be seen with this power.

    The normal approximation of McNemar's test: ``(z_alpha + z_beta) * sqrt(disagreement / n)``.

    Args:
        n: items both models answered.
        disagreement: share of items that just one of the two has right; less than one item counts as one.
        level: confidence of the test, two-sided.
        power: chance to see a true difference of that size.

    Raises:
        ValueError: no item, or a share out of range.

    Source: Connor 1987, with the variance under the null hypothesis.
    """
    if n < 1 or not 0 <= disagreement <= 1:
        raise ValueError(f"expected n >= 1 and a share from 0 to 1, got {n} and {disagreement}")
    total = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return float(min(1.0, total * math.sqrt(max(disagreement, 1 / n) / n)))


def mean(rows: FloatArray) -> float:
    """Return the mean of column 0."""
    return float(rows[:, 0].mean())


def perplexity(rows: FloatArray) -> float:
    """Return exp(-sum of log-likelihoods / sum of weights) of rows ``[loglikelihood in nats, weight]``."""
    return math.exp(-rows[:, 0].sum() / rows[:, 1].sum())


def bits(rows: FloatArray) -> float:
    """Return bits per unit of weight of rows ``[loglikelihood in nats, weight]``."""
    return float(-rows[:, 0].sum() / rows[:, 1].sum() / math.log(2))


def matthews(rows: FloatArray) -> float:
    """Return Matthews' correlation of rows ``[gold, predicted]``; 0 when a column is constant, as in scikit-learn."""
    gold, predicted = rows[:, 0], rows[:, 1]
    if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(np.corrcoef(gold, predicted)[0, 1])  # equal to Matthews' correlation for two classes


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given; they bound the chance of any false finding among all.

    Source: Holm 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pass_at(correct: int, samples: int, k: int) -> float:
    """Return the chance that at least one of ``k`` samples drawn from ``samples``, ``correct`` of them right, is right.

    Source: Chen et al. 2021, equation 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and {samples}, got {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(votes: Sequence[AnswerT | None]) -> AnswerT | None:
    """Return the most frequent vote, the earlier on a tie; abstentions (None) do not count; None when all abstain."""
    counted = Counter(vote for vote in votes if vote is not None)
    return counted.most_common(1)[0][0] if counted else None
