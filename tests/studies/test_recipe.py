from __future__ import annotations

from pathlib import Path

import pytest

from mambacus.runtime.errors import UserError
from mambacus.studies.recipe import choose_models, packaged_recipes, read_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
title: T
models:
  - {label: a, source: tiny}
  - {label: b, source: "random:micro", role: baseline}
finetune:
  - {label: lora, data: "wordproblems:10"}
solve: {bench: [wordproblems]}
"""


def test_packaged_recipes_are_found_by_name():
    assert {"cs5242", "demo", "smoke"} <= set(packaged_recipes())
    assert read_recipe("demo").name == "demo"


@pytest.mark.parametrize("name", ["cs5242", "smoke"])
def test_the_recipes_folder_shows_the_packaged_files(name):
    assert (ROOT / "recipes" / f"{name}.yaml").resolve() == ROOT / "mambacus" / "recipes" / f"{name}.yaml"


def test_the_original_study_in_full():
    recipe = read_recipe("cs5242")
    sources = {entry.source for entry in recipe.models}
    assert {f"state-spaces/mamba-{size}-hf" for size in ("130m", "370m", "1.4b")} <= sources
    assert {f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1.4b", "2.8b")} <= sources
    assert {"EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B"} <= sources
    assert {f"facebook/opt-{size}" for size in ("350m", "1.3b", "2.7b")} <= sources
    assert [entry.label for entry in recipe.models if entry.role == "subject"] == [
        "mamba-130m",
        "mamba-370m",
        "mamba-1.4b",
    ]
    assert len(set(recipe.evaluate["tasks"]) - {"lambada_openai"}) == 10  # the study read the standard variant alone
    ours, theirs = recipe.finetune
    assert theirs.settings["targets"] == ["x_proj", "embeddings", "in_proj", "out_proj"]
    assert (theirs.settings["rank"], theirs.settings["lr"], theirs.settings["batch_size"]) == (64, 2e-4, 1)
    assert theirs.settings["loss"] == "full"
    assert all(variant.data_offline == "gsm8k" for variant in (ours, theirs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: []", "at least one entry under models"),
        ("modells: [x]", "unknown key 'modells'; did you mean 'models'"),
        ("[1, 2]", "expected keys and values, got a list"),
        ("models: {a: b}", "models: expected a list"),
        ("models: [{label: a}]", "models\\[0\\]: missing key 'source'"),
        ("models: [{label: a, source: tiny, rolle: x}]", "unknown key 'rolle'; did you mean 'role'"),
        ("models: [{label: a, source: tiny, role: basline}]", "got 'basline'; did you mean 'baseline'"),
        ("models: [{label: a, source: tiny}, {label: a, source: tiny}]", "label a is given more than once"),
        ("models: [{label: a, source: tiny}]\nfinetune: [{label: x}]", "finetune\\[0\\]: missing key 'data'"),
        ("models: [{label: a, source: tiny}]\nsolve: 3", "solve: expected keys and values, got 3"),
        ("a: b: c", "is not valid YAML"),
        ("", "expected keys and values, got an empty file"),
        ("models: [{label: a, source: tiny}]\ntitle: [a]", "key 'title': expected str"),
        (
            "models: [{label: a, source: tiny}]\ncheck_attached: maybe",
            "key 'check_attached': expected bool, got 'maybe'",
        ),
        ("models: [{label: a, source: tiny}]\nmodels: []", "found the key 'models' twice"),
        ("models: [{label: a, source: null}]", "key 'source': expected str, got None"),
    ],
)
def test_faults_are_named(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_recipe(str(tmp_path / "r.yaml"))


def test_files_that_hold_no_recipe(tmp_path):
    for name, content, words in (
        ("utf16.yaml", "models: []".encode("utf-16"), "it is not UTF-8 text"),
        ("binary.yaml", bytes(range(256)), "it is not UTF-8 text"),
        ("code.yaml", b"a: !!python/object/apply:os.system ['touch ran']", "is not valid YAML"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_recipe(str(tmp_path / name))
    (tmp_path / "dir.yaml").mkdir()
    with pytest.raises(UserError, match="no such recipe"):
        read_recipe(str(tmp_path / "dir.yaml"))
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert read_recipe(str(tmp_path / "marked.yaml")).title == "T"


def test_a_missing_recipe_names_the_packaged_ones():
    with pytest.raises(UserError, match="did you mean 'cs5242'"):
        read_recipe("cs5422")
    with pytest.raises(UserError, match=r"no such recipe: nowhere/x.yaml .*cs5242"):
        read_recipe("nowhere/x.yaml")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return read_recipe(str(tmp_path / "small.yaml"))


def test_models_can_be_chosen_by_label(recipe):
    chosen, notes = choose_models(recipe, ("b",))
    assert [entry.label for entry in chosen.models] == ["b"] and notes == []


def test_another_model_stands_in_and_it_is_told(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    chosen, notes = choose_models(recipe, ("tiny", "owner/name", "random:micro", "mine"), here=tmp_path)
    assert [entry.label for entry in chosen.models] == ["tiny", "name", "random-micro", "mine"]
    assert all(entry.role == "subject" for entry in chosen.models)
    assert "tiny is no model of the recipe" in notes[0] and notes[-1] == "Models of the recipe left out: a, b."


def test_a_mistyped_label_is_no_model(recipe):
    with pytest.raises(UserError, match=r"--models: 'aa' is neither a label of the recipe .* did you mean 'a'"):
        choose_models(recipe, ("aa",))
