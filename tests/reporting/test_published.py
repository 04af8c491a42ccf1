"""Published figures stand beside measured ones, are marked, and change no test and no best of a row."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml
from synthetic_records import write_evaluate

from mambacus.reporting.page import build, render
from mambacus.reporting.sources import collect
from mambacus.studies.recipe import read_recipe

RIGHT = [1.0] * 40 + [0.0] * 60


def write(folder: Path, label: str, **config: object) -> None:
    tasks = {
        "lambada_openai": {"acc": RIGHT, "perplexity": [[-3.0, 1.0]] * 100},
        "hellaswag": {"acc": RIGHT, "acc_norm": RIGHT},
        "arc_challenge": {"acc_norm": RIGHT},
        "wikitext": {"word_perplexity": [[-300.0, 100.0]] * 20},
    }
    write_evaluate(folder / f"{len(list(folder.iterdir()))}.json", label, tasks, **config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "mamba-130m", model="state-spaces/mamba-130m-hf")
    write(tmp_path, "mamba-130m+lora", model="state-spaces/mamba-130m-hf", adapter="run/adapter")
    return tmp_path


def test_figures_are_those_of_the_model_and_the_metric(folder):
    page = build(collect([folder]))
    assert page.published.values == {
        ("mamba-130m", "lambada_openai", "perplexity"): 16.07,
        ("mamba-130m", "lambada_openai", "acc"): pytest.approx(0.443),
        ("mamba-130m", "hellaswag", "acc_norm"): pytest.approx(0.353),
        ("mamba-130m", "arc_challenge", "acc_norm"): pytest.approx(0.243),
        ("mamba-130m", "wikitext", "word_perplexity"): 26.25,
    }
    assert "Table 3" in page.published.source and "the original study" in page.published.source
    assert page.published.origins["mamba-130m", "wikitext", "word_perplexity"] == "original study, fp16"
    assert page.published.origins["mamba-130m", "lambada_openai", "acc"] == "Mamba paper, Table 3"


def test_the_original_study_stands_beside_its_own_tuned_model(tmp_path):
    write(tmp_path, "mamba-130m+cs5242", model="runs/merged")
    page = build(collect([tmp_path]))
    assert page.published.values == {("mamba-130m+cs5242", "wikitext", "word_perplexity"): 1.4e40}
    assert "published 1.4e+40" in render(page) and "Table 3" not in page.published.source


def test_no_figure_has_two_publications():
    text = resources.files("mambacus.reporting").joinpath("published.yaml").read_text(encoding="utf-8")
    columns = [tuple(column) for table in yaml.safe_load(text)["publications"] for column in table["columns"]]
    assert len(set(columns)) == len(columns)
    assert set(columns) & {("lambada_standard", "acc")} == set()  # cs5242.yaml says so
    assert "lambada_openai" in read_recipe("cs5242").evaluate["tasks"]


@pytest.mark.parametrize(
    ("label", "model", "known"),
    [
        ("mine", "EleutherAI/pythia-160m", True),
        ("Pythia-160M", "somewhere/else", True),
        ("pythia-160m-deduped", "EleutherAI/pythia-160m-deduped", False),
        ("mine", "runs/mamba-130m", False),
        ("tiny", "tiny", False),
    ],
)
def test_models_are_known_by_label_or_hub_id_and_by_nothing_else(tmp_path, label, model, known):
    write(tmp_path, label, model=model)
    assert bool(build(collect([tmp_path])).published.values) == known


def test_tables_mark_them_and_the_best_is_still_a_measured_one(folder):
    page = build(collect([folder]))
    scores = page.section("scores")
    rows = {(row[0].text, row[0].note): row for row in scores.tables[0].rows}
    plain, tuned = rows["LAMBADA openai, accuracy", "accuracy ↑"][1:]
    assert plain.text == "40.0 %" and plain.note.endswith("; published 44.3 %")
    assert "published" not in tuned.note and plain.style == tuned.style == ""
    assert "arXiv:2312.00752" in scores.about


def test_radar_draws_them_as_hollow_marks_on_axes_that_hold_them(folder):
    (radar,) = build(collect([folder])).radars
    plain, tuned = radar.polygons
    assert len(plain.published) == 5 and tuned.published == ()
    accuracy = next(mark for mark in plain.published if "LAMBADA openai, accuracy" in mark.tip)
    assert accuracy.tip.endswith("44.3 % accuracy, published (Mamba paper, Table 3)") and not accuracy.clipped
    (spoke,) = (spoke for spoke in radar.spokes if spoke.axis.key == ("lambada_openai", "perplexity"))
    assert spoke.axis.holds(16.07) and spoke.axis.position(16.07) > spoke.axis.position(20.1)
    assert any("not measured here" in note for note in radar.notes)
    assert 'class="mark published"' in render(build(collect([folder])))


def test_no_test_of_significance_sees_them(folder):
    pairs = ["mamba-130m=mamba-130m+lora"]
    shown, hidden = (build(collect([folder]), pairs=pairs, published=flag) for flag in (True, False))
    assert shown.pairs[0].comparisons == hidden.pairs[0].comparisons
    assert shown.headline == hidden.headline and shown.pairs[0].table == hidden.pairs[0].table
    assert hidden.published.values == {} and "published (" not in render(hidden)
