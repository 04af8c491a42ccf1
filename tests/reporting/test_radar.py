from __future__ import annotations

import math
from pathlib import Path

import pytest
from synthetic_records import write_evaluate, write_solve

from mambacus.reporting.formats import axis_end, show
from mambacus.reporting.metrics import TASKS, metric_kind
from mambacus.reporting.radar import FEW_AXES, MAX_RATIO, MIN_SPAN, make_axis, radar_keys
from mambacus.reporting.scores import Score, Scores
from mambacus.reporting.sources import collect

KNOWN = [(task, metric) for task, info in TASKS.items() for metric in info.main]


def scored(task: str, metric: str, *values: float) -> list[Score]:
    up = metric_kind(metric) != "perplexity"
    return [Score(f"m{place}", task, metric, value, None, None, 100, up, None) for place, value in enumerate(values)]


@pytest.mark.parametrize(("task", "metric"), KNOWN, ids=lambda value: str(value))
def test_outward_is_better_for_every_known_metric(task, metric):
    worse, better = (40.0, 12.0) if metric_kind(metric) == "perplexity" else (0.55, 0.62)
    axis = make_axis((task, metric), scored(task, metric, worse, better))
    assert 0 < axis.position(worse) < axis.position(better) <= 1


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("values", [(0.2, 0.4), (3.0, 90.0), (-2.0, 5.0)])
def test_outward_is_better_for_an_unknown_metric(values, higher_is_better):
    scores = [Score("m", "new_task", "new_metric", value, None, None, 9, higher_is_better, None) for value in values]
    axis = make_axis(("new_task", "new_metric"), scores)
    low, high = map(axis.position, values)
    assert (low < high) if higher_is_better else (low > high)


def test_shares_run_linearly_from_chance_to_a_round_rim():
    axis = make_axis(("arc_easy", "acc"), scored("arc_easy", "acc", 0.30, 0.57))
    assert (axis.inner, axis.outer) == (0.25, 0.6)
    assert axis.position(0.25) == 0 and axis.position(0.6) == 1
    assert axis.position(0.425) == pytest.approx(0.5)
    assert axis.transform == "linear, 25 % → 60 %"


def test_a_small_spread_is_not_magnified():
    axis = make_axis(("winogrande", "acc"), scored("winogrande", "acc", 0.505, 0.512))
    assert axis.outer - axis.inner == pytest.approx(MIN_SPAN)


def test_below_chance_is_drawn_at_the_centre_and_known_as_off_the_axis():
    axis = make_axis(("arc_easy", "acc"), scored("arc_easy", "acc", 0.21, 0.4))
    assert axis.position(0.21) == 0
    assert not axis.holds(0.21) and axis.holds(0.4)


def test_perplexity_is_inverted_and_logarithmic():
    axis = make_axis(("wikitext", "word_perplexity"), scored("wikitext", "word_perplexity", 80.0, 20.0))
    assert (axis.inner, axis.outer) == (100.0, 20.0)
    assert axis.position(math.sqrt(100 * 20)) == pytest.approx(0.5)  # the geometric mean lies half-way
    assert axis.value_at(0.5) == pytest.approx(math.sqrt(100 * 20))
    assert axis.position(20.0) == 1 and axis.position(100.0) == 0
    assert axis.position(80.0) > 0  # the worst model keeps a distance from the centre


@pytest.mark.parametrize("broken", [1.4e40, math.inf, math.nan])
def test_a_destroyed_model_does_not_squeeze_the_others(broken):
    axis = make_axis(("wikitext", "word_perplexity"), scored("wikitext", "word_perplexity", 26.25, 30.0, broken))
    assert axis.inner <= axis.outer * MAX_RATIO
    assert axis.position(broken) == 0 and not axis.holds(broken)
    assert axis.position(26.25) > axis.position(30.0) > 0


def test_a_bench_is_drawn_as_its_groups_only_beside_few_axes(tmp_path: Path):
    write_solve(tmp_path / "s.json", "m", {"wordproblems": [True, False, True, True]}, groups=["1 step", "2 steps"])
    few = Scores(collect([tmp_path / "s.json"]))
    assert [task for task, _ in radar_keys(few)] == ["wordproblems:1 step", "wordproblems:2 steps"]
    tasks = {name: {"acc": [1.0, 0.0]} for name in ("arc_easy", "winogrande", "piqa", "mathqa")}
    tasks |= {"hellaswag": {"acc_norm": [1.0, 0.0]}}
    assert len(tasks) == FEW_AXES
    write_evaluate(tmp_path / "e.json", "m", tasks)
    many = Scores(collect([tmp_path / "s.json", tmp_path / "e.json"]))
    assert [task for task, _ in radar_keys(many) if task.startswith("wordproblems")] == ["wordproblems"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("acc", 0.2338, "23.4 %"),
        ("word_perplexity", 26.254, "26.25"),
        ("word_perplexity", 1.4e40, "1.4e+40"),
        ("word_perplexity", math.inf, "infinite"),
        ("mcc", -0.0861, "−0.086"),
        ("acc", None, "–"),
    ],
)
def test_values_as_readers_see_them(metric, value, text):
    assert show(metric, value) == text


def test_axis_ends_drop_needless_decimals():
    assert axis_end("acc", 0.25) == "25 %"
    assert axis_end("word_perplexity", 110.0) == "110"
    assert axis_end("word_perplexity", 24000.0) == "24,000"
    assert axis_end("mcc", -0.25) == "−0.25"
    assert axis_end("word_perplexity", 2.6e7) == "2.6e+07"
