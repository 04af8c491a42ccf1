"""Intervals, verdicts and tables from known numbers."""

from __future__ import annotations

import pytest

from mambacus.runtime.stats import Interval
from mambacus.synthetic.recipe import Prediction
from mambacus.synthetic.verdicts import _notes, judge, summary, verdict

LOW = Prediction("t", "Mamba loses", "mamba_lower", (8, 16), 16, "t", None)


def row(arm, seed, x, accuracy, task="t", d_state=None):
    d_state = d_state or (16 if arm == "mamba" else None)
    return {
        "task": task, "arm": arm, "d_state": d_state, "seed": seed, "x": x, "x_name": "letters", "accuracy": accuracy,
    }  # fmt: skip


def rows(mamba, transformer):
    """Rows at x = 8 and 16 whose mean over both is as given for each seed."""
    found = []
    for arm, means in (("mamba", mamba), ("transformer", transformer)):
        for seed, mean in enumerate(means):
            found += [row(arm, seed, 8, mean + 0.05), row(arm, seed, 16, mean - 0.05), row(arm, seed, 99, 0.0)]
    return found


def test_means_and_t_intervals_over_seeds():
    table = summary([row("mamba", seed, 8, accuracy) for seed, accuracy in enumerate((0.4, 0.5, 0.6))])
    assert len(table) == 1
    line = table[0]
    assert (line["arm"], line["d_state"], line["x"], line["x_name"], line["seeds"]) == ("mamba", 16, 8, "letters", 3)
    assert line["mean"] == pytest.approx(0.5)
    half = 4.302653 * 0.1 / 3**0.5  # t of two degrees of freedom, standard error of the mean
    assert (line["low95"], line["high95"]) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_intervals_are_cut_to_shares_and_one_seed_has_none():
    wide = summary([row("mamba", 0, 8, 0.0), row("mamba", 1, 8, 1.0)])[0]
    assert (wide["low95"], wide["high95"]) == (0.0, 1.0)
    alone = summary([row("mamba", 0, 8, 0.7)])[0]
    assert (alone["mean"], alone["low95"], alone["high95"], alone["seeds"]) == (0.7, None, None, 1)


@pytest.mark.parametrize(
    ("mamba", "transformer", "held", "word"),
    [
        ((0.2, 0.22, 0.21), (0.9, 0.93, 0.92), True, "; as predicted"),
        ((0.9, 0.93, 0.92), (0.2, 0.22, 0.21), False, "not as predicted"),
        ((0.5, 0.9, 0.2), (0.6, 0.5, 0.7), "open", "undecided"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), False, "not as predicted"),
    ],
)
def test_verdicts(mamba, transformer, held, word):
    found = verdict(LOW, rows(mamba, transformer))
    assert found["held"] is held or found["held"] == held == "open"
    assert word in found["text"]
    assert found["difference"] == pytest.approx(sum(mamba) / 3 - sum(transformer) / 3)
    assert (found["prediction"], found["expects"], found["seeds"]) == ("Mamba loses", "mamba_lower", 3)


def test_the_comparison_is_paired_by_seed():
    # seeds differ much, the arms by exactly ten points: unpaired intervals would include 0
    found = verdict(LOW, rows((0.1, 0.5, 0.8), (0.2, 0.6, 0.9)))
    assert found["held"] is True
    assert found["text"].startswith(
        "Mamba (d_state 16) minus Transformer at 8, 16: -10.0 points [-10.0, -10.0], 3 seeds"
    )


def test_missing_runs_leave_a_prediction_open():
    assert verdict(LOW, [])["text"] == "not run yet"
    half = [one for one in rows((0.1, 0.2), (0.8, 0.9)) if not (one["seed"] == 1 and one["x"] == 16)]
    assert (verdict(LOW, half)["held"], verdict(LOW, half)["seeds"]) == ("open", 1)


def test_other_states_and_other_tasks_can_be_compared():
    table = [row("mamba", seed, 8, 0.9, d_state=64) for seed in range(3)]
    table += [row("mamba", seed, 8, 0.1 + seed / 100, d_state=4) for seed in range(3)]
    found = verdict(Prediction("t", "p", "mamba_higher", (8,), 64, "t", 4), table)
    assert found["held"] is True and "minus Mamba (d_state 4) at 8" in found["text"]
    table += [row("mamba", seed, 8, 0.5 + seed / 100, task="plain", d_state=64) for seed in range(3)]
    found = verdict(Prediction("t", "p", "mamba_higher", (8,), 64, "plain", 64), table)
    assert found["held"] is True and "Mamba (d_state 64) on plain" in found["text"]


@pytest.mark.parametrize(
    ("expects", "low", "high", "held"),
    [
        ("mamba_lower", -0.3, -0.1, True), ("mamba_lower", 0.1, 0.3, False), ("mamba_lower", -0.1, 0.1, "open"),
        ("mamba_higher", 0.1, 0.3, True), ("mamba_higher", -0.3, -0.1, False), ("mamba_higher", -0.1, 0.1, "open"),
        ("mamba_higher", -0.1, 0.0, False), ("open", 0.1, 0.3, "open"),
    ],
)  # fmt: skip
def test_judgement(expects, low, high, held):
    assert judge(expects, Interval((low + high) / 2, low, high), 3) == held
    assert judge(expects, Interval((low + high) / 2, low, high), 1) == "open"


def test_a_chosen_rate_at_the_end_of_the_grid_is_noted():
    tried = [
        {"task": "t", "arm": "mamba", "d_state": 16, "learning_rate": rate, "chosen": rate == 1e-2}
        for rate in (1e-4, 1e-3, 1e-2)
    ]
    assert _notes(tried) == ["t, mamba (d_state 16): the chosen rate 0.01 is the largest tried"]
    assert _notes([one | {"chosen": one["learning_rate"] == 1e-3} for one in tried]) == []
