from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_records import coin, flip, texts, write_evaluate, write_solve

from mambacus.reporting.compare import compare, conclusion, paired_share_interval, swap_test
from mambacus.reporting.scores import Scores
from mambacus.reporting.sources import collect
from mambacus.runtime.errors import UserError
from mambacus.runtime.stats import mean


def both(tmp_path: Path, before: dict, after: dict, write=write_evaluate) -> Scores:
    return Scores(collect([write(tmp_path / "a.json", "base", before), write(tmp_path / "b.json", "tuned", after)]))


def only(scores: Scores):
    rows, left_out = compare(scores, "base", "tuned")
    assert len(rows) == 1 and not left_out
    return rows[0]


def test_shares_against_hand_values(tmp_path: Path):
    before = coin(600, 0.05, 1)
    row = only(both(tmp_path, {"wordproblems": before}, {"wordproblems": flip(before, 40, 2)}, write_solve))
    assert (row.n, row.gained, row.lost) == (600, 40, 2)
    assert row.change == pytest.approx(38 / 600)
    assert row.p == pytest.approx(2 * sum(math.comb(42, k) for k in range(3)) / 2**42)  # the sign test on 42 pairs
    up, down = 41 / 602, 3 / 602
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 602)
    assert (row.low, row.high) == (pytest.approx(up - down - half), pytest.approx(up - down + half))
    assert row.p_adjusted == row.p and row.verdict == "better"


def test_the_interval_keeps_its_width_when_no_item_changed():
    low, high = paired_share_interval(0, 0, 100)
    assert low < 0 < high and high == pytest.approx(-low)


def test_equal_outcomes_are_no_finding(tmp_path: Path):
    items = {"arc_easy": {"acc": [1.0, 0.0] * 50}}
    row = only(both(tmp_path, items, items))
    assert (row.change, row.p, row.verdict) == (0, 1, "open")


@pytest.mark.parametrize(("shift", "verdict"), [(0.05, "worse"), (-0.05, "better")])
def test_perplexity_is_compared_as_a_ratio_and_lower_is_better(tmp_path: Path, shift, verdict):
    name = {"text_sample": {"word_perplexity": texts(60, 4.0, 7)}}
    other = {"text_sample": {"word_perplexity": texts(60, 4.0, 7, shift=shift)}}
    row = only(both(tmp_path, name, other))
    assert row.change == pytest.approx(math.expm1(shift))
    assert row.after / row.before == pytest.approx(math.exp(shift))
    assert row.low <= row.change <= row.high
    assert row.verdict == verdict


def test_perplexity_from_bare_loglikelihoods(tmp_path: Path):
    before, after = [[-2.0, 1], [-3.0, 1]] * 20, [[-2.5, 1], [-3.5, 1]] * 20
    row = only(both(tmp_path, {"lambada_openai": {"perplexity": before}}, {"lambada_openai": {"perplexity": after}}))
    assert (row.before, row.after) == (pytest.approx(math.exp(2.5)), pytest.approx(math.exp(3.0)))


def test_matthews_correlation(tmp_path: Path):
    gold = [place % 2 for place in range(200)]
    half = [[g, g if place < 100 else 1 - g] for place, g in enumerate(gold)]
    full = [[g, g] for g in gold]
    row = only(both(tmp_path, {"cola": {"mcc": half}}, {"cola": {"mcc": full}}))
    assert (row.before, row.after) == (pytest.approx(0.0), pytest.approx(1.0))
    assert row.kind == "correlation" and row.verdict == "better"


def test_several_samples_of_a_problem_are_averaged_first(tmp_path: Path):
    write_solve(tmp_path / "a.json", "base", {"gsm8k": [False, False, True, False]}, samples=2)
    write_solve(tmp_path / "b.json", "tuned", {"gsm8k": [True, False, True, True]}, samples=2)
    row = only(Scores(collect([tmp_path / "a.json", tmp_path / "b.json"])))
    assert (row.n, row.before, row.after) == (2, 0.25, 0.75)
    assert row.gained is None  # halves are not right or wrong: no McNemar test


def test_holm_runs_over_the_tests_of_one_pair(tmp_path: Path):
    arc, piqa = coin(300, 0.5, 1), coin(300, 0.5, 2)
    first = {"arc_easy": {"acc": [float(x) for x in arc]}, "piqa": {"acc": [float(x) for x in piqa]}}
    second = {
        "arc_easy": {"acc": [float(x) for x in flip(arc, 20, 5)]},
        "piqa": {"acc": [float(x) for x in flip(piqa, 12, 10)]},
    }
    rows, _ = compare(both(tmp_path, first, second), "base", "tuned")
    small, large = sorted(rows, key=lambda row: row.p)
    assert small.p_adjusted == pytest.approx(2 * small.p)
    assert large.p_adjusted == pytest.approx(max(large.p, small.p_adjusted))


def test_swap_test_is_exact_on_identical_and_extreme_data():
    same = np.arange(10.0)[:, None]
    assert swap_test(same, same, mean) == 1.0
    assert swap_test(same, same + 1, mean, iterations=2000) < 0.01  # true value 2 / 2^10
    assert swap_test(same, same + 1, mean, iterations=9) >= 1 / 10


def test_equal_ids_with_other_questions_are_never_paired(tmp_path: Path):
    write_solve(tmp_path / "a.json", "base", {"wordproblems": [True] * 5})
    write_solve(tmp_path / "b.json", "tuned", {"wordproblems": [True] * 5}, first_number=100)
    rows, left_out = compare(Scores(collect([tmp_path / "a.json", tmp_path / "b.json"])), "base", "tuned")
    assert not rows and left_out[0].reason == "the two runs saw different items"


def test_only_shared_items_are_compared(tmp_path: Path):
    before, after = {"arc_easy": {"acc": [1.0] * 10}}, {"arc_easy": {"acc": [1.0] * 4}}
    assert only(both(tmp_path, before, after)).n == 4


def test_common_items_and_a_short_items_file_are_told(tmp_path: Path):
    values = {"arc_easy": {"acc": [1.0] * 10}}
    scores = both(tmp_path, values, values)
    assert "10 items" in conclusion(only(scores)) and "Warning" not in conclusion(only(scores))
    (items,) = tmp_path.glob("b*.jsonl")
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:4]))
    said = conclusion(only(Scores(collect([tmp_path / "a.json", tmp_path / "b.json"]))))
    assert "compared on the 4 common items of 10" in said
    assert said.endswith("Warning: the items file of tuned has 4 of its record's 10 items.")


def test_the_same_score_twice_is_refused(tmp_path: Path):
    for name in ("a.json", "b.json"):
        write_evaluate(tmp_path / name, "base", {"arc_easy": {"acc": [1.0, 0.0]}})
    with pytest.raises(UserError, match="arc_easy of 'base' is in two records"):
        Scores(collect([tmp_path]))


@pytest.mark.parametrize(
    ("gained", "lost", "n", "words"),
    [
        (60, 2, 300, "ARC easy, accuracy: better, +19.3 points (95 % interval"),
        (2, 60, 300, "ARC easy, accuracy: worse, −19.3 points (95 % interval"),
        (5, 4, 300, "ARC easy, accuracy: no difference is shown, +0.3 points"),
        (5, 4, 40, "40 items, a smoke test rather than a measurement."),
    ],
)
def test_sentences_say_what_the_sample_allows(tmp_path: Path, gained, lost, n, words):
    values = coin(n, 0.5, 3)
    after = flip(values, gained, lost)
    row = only(
        both(
            tmp_path,
            {"arc_easy": {"acc": [float(x) for x in values]}},
            {"arc_easy": {"acc": [float(x) for x in after]}},
        )
    )
    assert words in conclusion(row)
