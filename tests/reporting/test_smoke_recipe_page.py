"""The smoke recipe's page from known inputs: radar, tables and text, and the orientation of every metric on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from synthetic_records import METRICS, coin, flip, record, texts, write_evaluate, write_record, write_solve

from mambacus.reporting.page import Page, build
from mambacus.reporting.sources import collect

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "smoke.yaml").read_text(encoding="utf-8"))
N = RECIPE["evaluate"]["limit"]
LABELS = ("tiny", "tiny+lora", "random")
METRIC_OF = {
    "text_sample": ("word_perplexity",),
    "lambada_openai": ("acc", "perplexity"),
    "hellaswag": ("acc_norm",),
    "cola": ("mcc",),
}


def items(task: str, metric: str, better: bool) -> list:
    """Return what a model scores on the items of a task: the better model's or the worse one's."""
    if metric.endswith("perplexity"):
        return texts(N, 3.0 if better else 3.4, 7)
    if metric == "mcc":
        gold = coin(N, 0.5, 3)
        guess = [answer if better or place % 3 else not answer for place, answer in enumerate(gold)]
        return [[int(answer), int(given)] for answer, given in zip(gold, guess, strict=True)]
    worse = coin(N, 0.3, len(task))
    return [float(value) for value in (flip(worse, 30, 2) if better else worse)]


def write(folder: Path, tuned_is_better: bool) -> Path:
    """Write the records of the smoke recipe; the baseline is as bad as the worse of the other two."""
    for label in LABELS:
        better = (label == "tiny+lora") == tuned_is_better and label != "random"
        tasks = {
            task: {metric: items(task, metric, better) for metric in METRIC_OF.get(task, ("acc",))}
            for task in RECIPE["evaluate"]["tasks"]
        }
        write_evaluate(folder / f"evaluate-{label}.json", label, tasks, limit=N)
        benches = {bench: [bool(x) for x in items(bench, "accuracy", better)] for bench in RECIPE["solve"]["bench"]}
        write_solve(folder / f"solve-{label}.json", label, benches, limit=N, bench=list(benches))
    models = [
        {"label": "tiny", "role": "subject"},
        {"label": "tiny+lora", "role": "tuned", "base": "tiny"},
        {"label": "random", "role": "baseline"},
    ]
    results = {"title": RECIPE["title"], "models": models, "steps": [], "substitutions": []}
    write_record(folder / "study.json", record("study", "smoke", {}, results))
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tuned is better", "tuned is worse"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, bool]:
    folder = write(tmp_path_factory.mktemp("smoke"), request.param)
    return build(collect([folder]), root=folder), request.param


EXPECTED = {
    "Word problems", "SVAMP", "ARC easy", "HellaSwag", "WinoGrande", "CoLA", "English novels",
    "LAMBADA openai, accuracy", "LAMBADA openai, perplexity",
}  # fmt: skip


def test_every_task_of_the_recipe_is_on_every_part_of_the_page(case):
    page, _ = case
    (radar,) = page.radars
    assert {spoke.axis.title for spoke in radar.spokes} == EXPECTED
    assert {row[0].text for row in radar.values.rows} == EXPECTED
    assert {row[0].text for row in page.pairs[0].table.rows} == EXPECTED
    assert {row[0].text for row in page.section("scores").tables[0].rows} == EXPECTED
    assert {bar.row.title for panel in page.pairs[0].panels for bar in panel.bars} == EXPECTED


def test_the_better_model_lies_further_out_on_every_axis(case):
    page, tuned_is_better = case
    (radar,) = page.radars
    plain, tuned, _ = radar.polygons
    assert (plain.label, tuned.label) == ("tiny", "tiny+lora")
    for spoke, one, other in zip(radar.spokes, plain.marks, tuned.marks, strict=True):
        reach = [((mark.x - 50) ** 2 + (mark.y - 50) ** 2) ** 0.5 for mark in (one, other)]
        assert (reach[1] > reach[0]) == tuned_is_better, spoke.axis.title


def test_the_better_model_is_right_of_zero_and_called_better(case):
    page, tuned_is_better = case
    verdicts = {row[0].text: row[-1].text for row in page.pairs[0].table.rows}
    assert set(verdicts.values()) == {"better" if tuned_is_better else "worse"}, verdicts
    for panel in page.pairs[0].panels:
        for bar in panel.bars:
            assert (bar.middle > panel.zero) == tuned_is_better, bar.row.title


def test_the_best_of_a_row_is_the_better_model_and_arrows_say_so(case):
    page, tuned_is_better = case
    for row in page.section("scores").tables[0].rows:
        plain, tuned, _ = row[1:]
        assert (tuned.style, plain.style) == (("best", "") if tuned_is_better else ("", "best")), row[0].text
        assert row[0].note.endswith("↓" if "perplexity" in row[0].note else "↑")


def test_known_figures(case):
    page, tuned_is_better = case
    solving = {(row[0].text, row[0].note): row[2].text for row in page.section("solving").tables[0].rows}
    right = sum(items("wordproblems", "accuracy", not tuned_is_better))
    assert solving["Word problems", "tiny [6]"] == f"{right:.0f}"
    gained = {row[0].text: row[5].text for row in page.pairs[0].table.rows}
    assert gained["ARC easy"] == gained["SVAMP"] == ("+30 / −2" if tuned_is_better else "+2 / −30")
    assert page.notices == (f"Only the first {N} items of each task were used in [1][2][3][4][5][6] (--limit {N}).",)


def test_the_sentence_says_which_way_it_went(case):
    page, tuned_is_better = case
    (sentence,) = page.headline
    assert ("accuracy on Word problems rose" in sentence) == tuned_is_better
    assert ("perplexity on English novels fell" in sentence) == tuned_is_better
    assert [card.style for card in page.cards] == (["better", "better"] if tuned_is_better else ["worse", "worse"])


def test_directions_of_the_synthetic_metrics_are_those_of_their_kind():
    assert {metric for metric, up in METRICS.items() if not up} == {m for m in METRICS if m.endswith("perplexity")}
