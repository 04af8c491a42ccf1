"""Statistics against hand values, published values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mambacus.runtime import stats


def test_wilson_matches_the_closed_form() -> None:
    correct, n, z = 8, 10, scipy_stats.norm.ppf(0.975)
    share = correct / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert stats.wilson(correct, n) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert stats.wilson(correct, n) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai and DasGupta's example


def test_wilson_stays_inside_the_unit_interval_and_admits_ignorance() -> None:
    assert stats.wilson(0, 50)[0] == 0.0
    assert 0.0 < stats.wilson(0, 50)[1] < 0.1
    assert stats.wilson(50, 50)[1] == 1.0
    assert stats.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (3, 3, 1.0), (1, 9, 22 / 1024)])
def test_mcnemar_is_the_exact_sign_test(b: int, c: int, p: float) -> None:
    assert stats.mcnemar_exact(b, c) == pytest.approx(p, abs=1e-12)


def test_paired_bootstrap_agrees_with_the_t_interval_on_many_items() -> None:
    random = np.random.default_rng(1)
    before = random.normal(size=(400, 1))
    after = before + 0.2 + 0.5 * random.normal(size=(400, 1))
    found = stats.paired_bootstrap(before, after, stats.mean, iterations=4000)
    expected = scipy_stats.ttest_rel(after[:, 0], before[:, 0]).confidence_interval()
    assert found.estimate == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(expected.low, abs=0.005)
    assert found.high == pytest.approx(expected.high, abs=0.005)


def test_paired_bootstrap_keeps_pairs_and_its_seed() -> None:
    before = np.arange(20.0)[:, None]
    constant = stats.paired_bootstrap(before, before + 1.0, stats.mean)
    assert (constant.low, constant.high) == pytest.approx((1.0, 1.0))  # unpaired resampling would spread
    noisy = before * 1.1
    assert stats.paired_bootstrap(before, noisy, stats.mean, seed=3) == stats.paired_bootstrap(
        before, noisy, stats.mean, seed=3
    )
    assert stats.paired_bootstrap(before, noisy, stats.mean, seed=3) != stats.paired_bootstrap(
        before, noisy, stats.mean, seed=4
    )


def test_paired_bootstrap_refuses_items_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="same items"):
        stats.paired_bootstrap(np.zeros((3, 1)), np.zeros((4, 1)), stats.mean)
    with pytest.raises(ValueError, match="same items"):
        stats.paired_bootstrap(np.zeros((0, 1)), np.zeros((0, 1)), stats.mean)


def test_perplexity_and_bits_weigh_documents() -> None:
    rows = np.array([[-math.log(2) * 10, 10.0], [-math.log(8) * 10, 10.0]])
    assert stats.perplexity(rows) == pytest.approx(4.0)
    assert stats.bits(rows) == pytest.approx(2.0)


def test_matthews_matches_scikit_learn() -> None:
    from sklearn.metrics import matthews_corrcoef

    rows = np.random.default_rng(0).integers(0, 2, size=(200, 2)).astype(float)
    assert stats.matthews(rows) == pytest.approx(matthews_corrcoef(rows[:, 0], rows[:, 1]))
    assert stats.matthews(np.array([[1.0, 1.0], [0.0, 1.0]])) == 0.0


def test_holm_follows_the_definition_and_keeps_order() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_pass_at_k_counts_subsets() -> None:
    assert stats.pass_at(1, 4, 1) == pytest.approx(0.25)
    assert stats.pass_at(1, 4, 2) == pytest.approx(0.5)
    assert stats.pass_at(0, 4, 4) == 0.0
    assert stats.pass_at(4, 4, 1) == 1.0
    with pytest.raises(ValueError, match="between 1 and 4"):
        stats.pass_at(1, 4, 5)


def test_majority_ignores_abstentions_and_breaks_ties_by_order() -> None:
    assert stats.majority([None, "3", "4", "4", None, None]) == "4"
    assert stats.majority(["3", "4"]) == "3"
    assert stats.majority([None, None]) is None
    assert stats.majority([]) is None


def test_clustered_mean_is_wider_where_items_of_a_cluster_agree() -> None:
    alike = [1.0] * 20 + [0.0] * 20
    clusters = [n // 10 for n in range(40)]
    mixed = [float(n % 2) for n in range(40)]
    wide, narrow = stats.clustered_mean(alike, clusters), stats.clustered_mean(mixed, clusters)
    assert wide.estimate == narrow.estimate == 0.5
    assert narrow.high - narrow.low == pytest.approx(0.0)  # every cluster has the same mean
    # four cluster sums of +-5: variance 4/3 * 100 / 1600, t(3) = 3.182
    assert wide.high - wide.estimate == pytest.approx(3.18245 * (4 / 3 * 100) ** 0.5 / 40, rel=1e-4)


def test_clusters_of_one_give_the_usual_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    found = stats.clustered_mean(values, range(5))
    assert found.high - found.estimate == pytest.approx(2.77645 * np.std(values, ddof=1) / 5**0.5, rel=1e-4)


def test_one_cluster_says_nothing_of_others() -> None:
    found = stats.clustered_mean([1.0, 0.0], ["a", "a"])
    assert (found.low, found.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="a cluster for each"):
        stats.clustered_mean([1.0], [])


def test_detectable_difference_is_seen_four_times_in_five() -> None:
    n, disagreement = 1000, 0.2
    difference = stats.detectable_difference(n, disagreement)
    assert difference == pytest.approx(2.8016 * (0.2 / 1000) ** 0.5, rel=1e-3)
    chance = np.random.default_rng(0)
    up = (disagreement + difference) / 2
    draws = chance.multinomial(n, [up, disagreement - up, 1 - disagreement], size=400)
    seen = sum(stats.mcnemar_exact(down, gained) < 0.05 for gained, down, _ in draws.tolist())
    assert 0.72 <= seen / 400 <= 0.86
    assert stats.detectable_difference(1, 0.0) == 1.0
