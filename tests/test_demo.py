"""The demo is the packaged recipe; its real run is `make demo`."""

from __future__ import annotations

import gzip
import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from synthetic_records import write_study

from mambacus import demo, report, study
from mambacus.cli import main
from mambacus.runtime.records import read_jsonl
from mambacus.studies.recipe import read_recipe


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic finished study."""
    folder = write_study(tmp_path_factory.mktemp("demo"))
    report.run(report.Config(records=(str(folder),), out=folder / study.PAGE))
    return folder


@pytest.fixture
def finished(monkeypatch, example):
    """Replace the study's run by a copy of the synthetic study; return the configurations it got."""
    seen = []

    def run(config):
        seen.append(config)
        shutil.copytree(example, config.out)

    monkeypatch.setattr(study, "run", run)
    return seen


def test_the_demo_is_the_packaged_recipe(finished, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "d")]) == 0
    assert finished == [study.Config(recipe="demo", out=tmp_path / "d", models=())]


def test_another_model_and_a_limit_are_passed_on(finished, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "d"), "--model", "random:micro", "--limit", "5", "--resume"]) == 0
    (config,) = finished
    assert (config.models, config.limit, config.resume) == (("random:micro",), 5, True)


def test_the_summary_tells_gain_cost_checks_speed_and_where_the_page_lies(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["demo", "--out", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    for words in (
        *("4.3 %", "75.7 %", "+71.3 points", "+67.4 to +74.8", "× 10⁻¹²⁴", "better"),
        *("55.43", "57.86", "+4.4 %", "worse", "all of their answers are equal to the last character"),
        *("finetune: 2 min 23 s, 8,380 tokens/s", "solve wordproblems with tiny: 1,834 tokens/s", "report.html"),
    ):
        assert words in out, words


def test_the_recipe_meets_what_the_demo_promises():
    recipe = read_recipe(demo.RECIPE)
    assert [entry.source for entry in recipe.models] == ["tiny"]
    assert recipe.solve["bench"] == ["wordproblems", "wordproblems_novel"] and recipe.solve["limit"] >= 500
    assert recipe.evaluate["tasks"] == ["text_sample"]
    assert recipe.check_attached
    assert all(variant.settings["data"].startswith("wordproblems:") for variant in recipe.finetune)


def passages() -> list[dict]:
    with resources.as_file(resources.files("mambacus.data") / "text_sample" / "passages.jsonl") as path:
        return [row for _, row in read_jsonl(Path(path))]


def test_the_text_sample_is_sixty_passages_with_their_origin():
    rows = passages()
    assert len(rows) == len({row["id"] for row in rows}) == 60
    assert all(row["title"] and row["author"] and row["year"] <= 1928 for row in rows)
    sizes = [len(row["text"].encode()) for row in rows]
    assert min(sizes) >= 900 and 55_000 < sum(sizes) < 70_000


def test_the_text_sample_is_not_in_the_training_books(data_dir):
    titles = {row["title"] for row in passages()}
    with gzip.open(data_dir / "text" / "books_valid.jsonl.gz", "rt", encoding="utf-8") as file:
        valid = {book["title"]: book["text"] for book in map(json.loads, file)}
    assert all(row["text"] in valid[row["title"]] for row in passages())
    for path in sorted((data_dir / "text").glob("books_train_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            assert titles.isdisjoint(json.loads(line)["title"] for line in file)


def test_the_text_sample_is_a_task_that_needs_no_data_folder():
    from mambacus.evals.catalogue import load_tasks

    (task,), _ = load_tasks(["text_sample"], None)
    documents = list(task.test_docs())
    assert [document["page"] for document in documents] == [row["text"] for row in passages()]
    first = documents[0]
    scores = task.process_results(first, (-100.0,))
    assert scores["word_perplexity"] == (-100.0, len(first["page"].split()))
    assert scores["byte_perplexity"] == (-100.0, len(first["page"].encode()))


def test_the_recorded_demo_keeps_its_promises():
    folder = Path(__file__).parents[1] / "benchmarks" / "cpu-demo-2026-11-26"
    results = json.loads((folder / "report.json").read_text())["results"]
    by_task = {comparison["task"]: comparison for comparison in results["comparisons"]}
    problems, text = by_task["wordproblems"], by_task["text_sample"]
    assert problems["n"] >= 500 and problems["p"] < 0.001 and problems["after"] >= 0.60 > problems["before"]
    assert text["change"] < 0.10
    assert any("all of their answers are equal" in check for check in results["checks"])
    merged, attached = (
        [(item["prompt"], item["completion"]) for _, item in read_jsonl(folder / stage / "tiny+lora.items.jsonl")]
        for stage in ("solve", "check")
    )
    assert len(merged) == 1000 and merged == attached
    recorded = json.loads((folder / "finetune" / "tiny+lora" / "record.json").read_text())["config"]
    (variant,) = read_recipe(demo.RECIPE).finetune
    for name in ("data", "epochs", "lr", "dropout", "batch_size", "max_length", "pack_length", "seed", "dtype"):
        assert recorded[name] == variant.settings[name], name
