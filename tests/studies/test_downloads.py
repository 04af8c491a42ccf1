"""Data sets that a study fetches, with sizes where they are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambacus.studies.downloads import DATA_SETS, TASK_SETS, data_sets
from mambacus.studies.plan import Overrides, make_plan
from mambacus.studies.recipe import packaged_recipes, read_recipe
from mambacus.study import VERBS, command


def fetched(name: str, data_dir: Path | None = None) -> dict[str, float | None]:
    configs = {verb: command(verb).Config for verb in VERBS}
    return data_sets(make_plan(read_recipe(name), Path("out"), configs, Overrides(0, data_dir, "")).steps)


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_set_of_the_packaged_recipes_is_in_the_catalogue(name):
    assert all(fetched(name).values())


def test_the_original_study_reads_its_training_data_and_tasks_from_the_hub_or_a_folder(tmp_path):
    found = fetched("cs5242")
    assert found["microsoft/orca-math-word-problems-200k"] == 84.0 and "openai/gsm8k" in found
    assert fetched("cs5242", tmp_path) == {}


def test_what_is_not_known_is_no_zero(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("""
models: [{label: a, source: tiny}]
finetune: [{label: l, data: someone/unheard-of}]
evaluate: {tasks: [text_sample, sciq]}
""")
    assert fetched(str(recipe)) == {"documents of sciq": None, "someone/unheard-of": None}
    assert set(TASK_SETS.values()) <= set(DATA_SETS)
