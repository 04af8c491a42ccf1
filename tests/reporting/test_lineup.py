from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import record, write_solve, write_study, write_training

from mambacus.reporting.lineup import line_up
from mambacus.reporting.sources import collect
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import write_record

RIGHT = {"wordproblems": [True, False]}


def test_a_study_says_who_is_who(tmp_path: Path):
    lineup = line_up(collect([write_study(tmp_path)]))
    assert lineup.pairs == [("tiny", "tiny+lora")]
    assert lineup.checks == [("tiny+lora", "tiny+lora (attached)")]
    assert [model.label for model in lineup.shown] == ["tiny", "tiny+lora", "pythia-tiny"]


def test_pairs_are_traced_through_merge_and_finetune(tmp_path: Path):
    write_training(tmp_path)
    write_solve(tmp_path / "x.json", "after", RIGHT, model=str(tmp_path / "merge" / "tiny+lora"))
    write_solve(tmp_path / "y.json", "before", RIGHT, model="tiny")
    write_solve(tmp_path / "z.json", "other", RIGHT, model="random:tiny")
    lineup = line_up(collect([tmp_path]))
    assert lineup.pairs == [("before", "after")]
    assert "traced" in lineup.origin


def test_pairs_are_traced_through_an_attached_adapter(tmp_path: Path):
    write_solve(tmp_path / "x.json", "after", RIGHT, model="tiny", adapter="somewhere/adapter")
    write_solve(tmp_path / "y.json", "before", RIGHT, model="tiny")
    assert line_up(collect([tmp_path])).pairs == [("before", "after")]


def test_two_unrelated_models_are_compared_in_the_order_given_and_the_page_says_so(tmp_path: Path):
    first = write_solve(tmp_path / "b.json", "one", RIGHT)
    second = write_solve(tmp_path / "a.json", "two", RIGHT)
    lineup = line_up(collect([first, second]))
    assert lineup.pairs == [("one", "two")]
    assert "first one given" in lineup.origin


def test_three_unrelated_models_make_no_pair(tmp_path: Path):
    for label in ("one", "two", "three"):
        write_solve(tmp_path / f"{label}.json", label, RIGHT)
    assert line_up(collect([tmp_path])).pairs == []


def test_named_pairs_win(tmp_path: Path):
    lineup = line_up(collect([write_study(tmp_path)]), ["pythia-tiny=tiny"])
    assert lineup.pairs == [("pythia-tiny", "tiny")]


@pytest.mark.parametrize(
    ("pair", "words"), [("tiny", "expected base=tuned"), ("tinny=tiny+lora", "did you mean 'tiny'")]
)
def test_wrong_pairs(tmp_path: Path, pair, words):
    with pytest.raises(UserError, match=words):
        line_up(collect([write_study(tmp_path)]), [pair])


def test_a_baseline_without_a_study_entry_is_still_shown(tmp_path: Path):
    write_study(tmp_path)
    write_solve(tmp_path / "late.json", "latecomer", RIGHT)
    assert [model.role for model in line_up(collect([tmp_path])).models if model.label == "latecomer"] == ["baseline"]


def test_labels_without_scores_are_left_out(tmp_path: Path):
    models = [{"label": "never run", "role": "baseline"}]
    results = {"title": "t", "models": models, "steps": [], "substitutions": []}
    write_record(tmp_path / "study.json", record("study", "s", {}, results))
    write_solve(tmp_path / "a.json", "one", RIGHT)
    assert [model.label for model in line_up(collect([tmp_path])).models] == ["one"]
