"""Statistics of paired evaluations, on scipy: Wilson interval, exact McNemar test, paired bootstrap, Holm's correction.

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
