from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from mambacus import bench, bench_generation, evaluate, finetune, merge, solve
from mambacus.bench_plan import idle
from mambacus.runtime.config import parse
from mambacus.runtime.errors import UserError
from mambacus.studies.plan import Overrides, command_line, make_plan, settings_of
from mambacus.studies.recipe import ModelEntry, Recipe, Variant, packaged_recipes, read_recipe

MODULES = {
    "bench": bench, "bench generation": bench_generation, "evaluate": evaluate, "finetune": finetune, "merge": merge,
    "solve": solve,
}  # fmt: skip
CONFIGS = {verb: module.Config for verb, module in MODULES.items()}
OUT = Path("runs/x")
RECIPE = Recipe(
    name="r",
    title="R",
    description="",
    models=(ModelEntry("m", "tiny"), ModelEntry("p", "owner/p", "baseline")),
    finetune=(
        Variant("lora", {"data": "hub/data", "epochs": 1}, data_offline="gsm8k"),
        Variant("full", {"data": "wordproblems:9", "method": "full"}),
    ),
    evaluate={"tasks": ["arc_easy", "piqa"]},
    solve={"bench": ["wordproblems"], "max_new_tokens": 9},
    check_attached=True,
)


def plan_of(recipe: Recipe = RECIPE, **overrides):
    return make_plan(recipe, OUT, CONFIGS, Overrides(**overrides))


def test_stages_in_order():
    assert [(step.stage, step.verb, step.label) for step in plan_of().steps] == [
        ("baseline", "evaluate", "m"),
        ("baseline", "solve", "m"),
        ("baseline", "evaluate", "p"),
        ("baseline", "solve", "p"),
        ("finetune", "finetune", "m+lora"),
        ("finetune", "finetune", "m+full"),
        ("merge", "merge", "m+lora"),
        ("evaluate", "evaluate", "m+lora"),
        ("evaluate", "evaluate", "m+full"),
        ("solve", "solve", "m+lora"),
        ("solve", "solve", "m+full"),
        ("check", "solve", "m+lora (attached)"),
    ]


def test_the_tuned_model_is_what_merge_or_full_tuning_leaves():
    steps = {(step.stage, step.label): step for step in plan_of().steps}
    assert steps["merge", "m+lora"].config.adapter == (OUT / "finetune/m+lora/adapter",)
    assert steps["solve", "m+lora"].config.model == "runs/x/merge/m+lora"
    assert steps["solve", "m+full"].config.model == "runs/x/finetune/m+full/model"
    assert steps["solve", "m+lora"].needs == (OUT / "merge/m+lora/record.json",)
    check = steps["check", "m+lora (attached)"].config
    assert (check.model, check.adapter) == ("tiny", OUT / "finetune/m+lora/adapter")


def test_roles_for_the_report():
    rows = [(row["label"], row["role"], row["base"]) for row in plan_of().models]
    assert rows == [
        ("m", "subject", None),
        ("p", "baseline", None),
        ("m+lora", "tuned", "m"),
        ("m+full", "tuned", "m"),
        ("m+lora (attached)", "check", "m+lora"),
    ]


def test_offline_data_takes_over_only_with_a_data_folder_and_is_told(tmp_path):
    online, offline = plan_of(), plan_of(data_dir=tmp_path)
    data = [step.config.data for step in online.steps if step.verb == "finetune"]
    assert data == ["hub/data", "wordproblems:9"] and online.notes == ()
    assert [step.config.data for step in offline.steps if step.verb == "finetune"] == ["gsm8k", "wordproblems:9"]
    assert offline.notes == (
        "Fine-tuning lora uses gsm8k of the local data folder instead of hub/data (data_offline of the recipe).",
    )
    assert all(step.config.data_dir == tmp_path for step in offline.steps)


def test_a_limit_reaches_every_stage_and_is_told():
    plan = plan_of(dataclasses.replace(RECIPE, bench=({"what": "decode"},)), limit=20)
    for step in plan.steps:
        value = {"finetune": "max_steps", "evaluate": "limit", "solve": "limit", "bench": "repeats"}.get(step.verb)
        assert value is None or getattr(step.config, value) == (1 if step.verb == "bench" else 20)
    assert "--limit 20" in plan.notes[0]
    steps = plan_of(dataclasses.replace(RECIPE, bench=({"what": "eval"}, {"what": "scan"})), limit=20).steps
    configs = [step.config for step in steps if step.verb == "bench"]
    assert [(config.documents, config.repeats) for config in configs] == [(20, 3), (100, 3)]
    assert not any(map(idle, configs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"task": ["piqa"]}}, "evaluate of m: unknown key 'task'; did you mean 'tasks'"),
        ({"solve": {"bench": ["gsm8k"], "limit": "many"}}, "solve of m: key 'limit': expected int, got 'many'"),
        ({"finetune": (Variant("x", {"data": "d", "rang": 3}),)}, "finetune of m\\+x: unknown key 'rang'"),
        ({"evaluate": {"limit": 3}}, "evaluate of m: missing key 'tasks'"),
        ({"evaluate": {"tasks": None}}, "evaluate of m: key 'tasks': expected str, got None"),
        ({"evaluate": {"tasks": ["piqa"], "limit": 0}}, "r: evaluate of m: --limit: expected 1 or more, got 0"),
        ({"solve": {"bench": ["gsm8"]}}, "solve of m: --bench: expected one of .*did you mean 'gsm8k'"),
        ({"solve": {"bench": ["gsm8k"], "style": "foo"}}, "solve of m: --style: expected one of"),
        ({"bench": ({"what": "trian"},)}, "did you mean 'train'"),
        ({"finetune": (Variant("x", {"data": "d", "lr": float("nan")}),)}, "--lr: expected 0 or more, got nan"),
        ({"merge": {"dtype": "float23"}}, "merge of m\\+lora: --dtype: expected one of"),
    ],
)
def test_faults_in_settings_are_found_before_anything_runs(changes, words):
    with pytest.raises(UserError, match=words):
        plan_of(dataclasses.replace(RECIPE, **changes))


def test_labels_that_would_share_a_record_are_refused():
    twins = dataclasses.replace(RECIPE, models=(ModelEntry("a/b", "tiny"), ModelEntry("a-b", "tiny", "baseline")))
    with pytest.raises(UserError, match=r"evaluate of a-b: runs/x/evaluate/a-b.json would be that of a/b too"):
        plan_of(twins)


def test_generation_is_measured_with_every_model_of_the_recipe():
    recipe = dataclasses.replace(RECIPE, generation={"prompts": "wordproblems", "limit": 5})
    steps = [step for step in plan_of(recipe).steps if step.verb == "bench generation"]
    assert [(step.stage, step.label, step.config.model, step.config.limit) for step in steps] == [
        ("bench", "m", "tiny", 5),
        ("bench", "p", "owner/p", 5),
    ]
    config = next(step.config for step in plan_of(recipe, limit=20).steps if step.verb == "bench generation")
    assert (config.limit, config.repeats) == (2, 1)
    settings = (
        config.new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.min_p,
        config.repetition_penalty,
    )
    assert settings == (100, 1.0, 1, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_has_a_plan_and_its_commands_parse_to_the_same_settings(name):
    recipe = read_recipe(name)
    plan = make_plan(recipe, OUT, CONFIGS, Overrides())
    assert len({step.record for step in plan.steps}) == len(plan.steps)
    for step in plan.steps:
        words = ["mambacus", *step.verb.split()]
        given = shlex.split(step.command)
        assert given[: len(words)] == words
        assert parse(CONFIGS[step.verb], given[len(words) :], "x", "") == step.config


def test_command_lines_quote_and_leave_out_defaults():
    config = evaluate.Config(model="a b", tasks=("x", "y"), out=Path("o.json"), state_reuse=False)
    assert command_line("evaluate", config) == (
        "mambacus evaluate --model 'a b' --tasks x,y --out o.json --no-state-reuse"
    )


def test_settings_do_not_depend_on_where_the_study_lies():
    first = settings_of({"model": "runs/x/merge/m", "out": "runs/x/a.json", "seed": 1}, "runs/x")
    second = settings_of({"model": "/else/merge/m", "out": "/else/a.json", "seed": 1}, "/else")
    assert first == second == {"model": "OUT/merge/m", "seed": 1}
