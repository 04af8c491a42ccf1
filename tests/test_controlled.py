"""``mambacus controlled``: packaged recipes shrunk to seconds, resume, faults in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from mambacus import cli, controlled
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record
from mambacus.synthetic.recipe import PACKAGED, make_recipe, packaged_recipes, read_recipe
from mambacus.synthetic.runs import TUNING_SEED, arms_of, best_rate

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ("phonebook", "mqar", "addition", "wordproblems")


def loaded(name):
    return yaml.safe_load((PACKAGED / f"{name}.yaml").read_text(encoding="utf-8"))


def shrunk(name):
    """Return a packaged recipe with the same tasks, arms and predictions at sizes for a test."""
    small = loaded(name)
    layers = {"mamba_layers": 2, "transformer_layers": 1, "head_dim": 8}
    small["arms"] |= {"parameters": 30_000, "d_state": small["arms"]["d_state"][:2], **layers}
    small["training"] |= {"batch": 4, "learning_rates": [0.001, 0.004], "seeds": 2, "valid_rows": 4, "test_rows": 4}
    for task in small["tasks"]:
        for key in ("batch", "train_rows"):
            task.pop(key, None)
        if name != "wordproblems":
            task["train_x"], task["test_x"] = [3, 4], [3, 5]
    small["training"].pop("train_rows", None)
    states = small["arms"]["d_state"]
    for prediction in small["predictions"]:
        prediction.pop("x", None)
        for key in ("d_state", "against_d_state"):
            if key in prediction:
                prediction[key] = states[0] if prediction[key] == states[0] else states[-1]
    return small


@pytest.fixture
def recipe_file(tmp_path):
    def write(content, name="small"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def study(path, out, **settings):
    return controlled.run(controlled.Config(recipe=str(path), out=out, device="cpu", limit_steps=2, **settings))


def timeless(results):
    kept = copy.deepcopy(results)
    kept["seconds"] = 0
    for row in (*kept["rows"], *kept["tuning"]):
        row["seconds"] = 0
    return kept


@pytest.mark.parametrize("name", STUDIES)
def test_packaged_recipes_are_whole(name):
    assert name in packaged_recipes()
    recipe = read_recipe(name)
    assert (ROOT / "recipes" / "controlled" / f"{name}.yaml").resolve() == ROOT / "mambacus/recipes/controlled" / (
        f"{name}.yaml"
    )
    arms = arms_of(recipe.arms)
    sizes = [arm.parameters for arm in arms]
    assert max(sizes) / min(sizes) <= 1.02
    assert recipe.predictions and recipe.sources
    assert all(entry.training.seeds == 3 and len(entry.training.learning_rates) >= 3 for entry in recipe.tasks)
    assert {prediction.task for prediction in recipe.predictions} <= {entry.name for entry in recipe.tasks}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_end_to_end(recipe_file, tmp_path, name, capsys):
    record = study(recipe_file(shrunk(name)), tmp_path / "out")
    assert record.kind == "controlled"
    recipe = read_recipe(str(tmp_path / "small.yaml"))
    found = read_record(tmp_path / "out" / "record.json").results
    arms = arms_of(recipe.arms)
    tested = sum(len(entry.test_x) for entry in recipe.tasks)
    assert len(found["rows"]) == tested * len(arms) * 2
    assert len(found["summary"]) == tested * len(arms)
    assert len(found["tuning"]) == len(recipe.tasks) * len(arms) * 2
    assert len(found["verdicts"]) == len(found["predictions"]) == len(recipe.predictions)
    assert found["runs"]["planned"] == found["runs"]["finished"] == len(list((tmp_path / "out" / "runs").iterdir()))
    for row in found["rows"]:
        assert 0 <= row["accuracy"] <= 1 and row["n"] >= 4 and row["train_tokens"] > 0 and row["seed"] in (0, 1)
    for tried in found["tuning"]:
        assert tried["seed"] == TUNING_SEED
    chosen = [tried for tried in found["tuning"] if tried["chosen"]]
    assert len(chosen) == len(recipe.tasks) * len(arms)
    used = {(row["task"], row["arm"], row["d_state"], row["learning_rate"]) for row in found["rows"]}
    assert used == {(tried["task"], tried["arm"], tried["d_state"], tried["learning_rate"]) for tried in chosen}
    controlled.print_outcome(record, tmp_path / "out")
    assert "predicted: " in capsys.readouterr().out


def test_a_study_that_was_cut_off_goes_on_to_the_same_record(recipe_file, tmp_path):
    path = recipe_file(shrunk("mqar"))
    whole = study(path, tmp_path / "whole")
    study(path, tmp_path / "cut")
    files = sorted((tmp_path / "cut" / "runs").iterdir())
    for gone in files[::3]:
        gone.unlink()
    kept = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    with pytest.raises(UserError, match="add --resume"):
        study(path, tmp_path / "cut")
    again = study(path, tmp_path / "cut", resume=True)
    assert timeless(again.results) == timeless(whole.results)
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    changed = shrunk("mqar")
    changed["training"]["weight_decay"] = 0.0
    with pytest.raises(UserError, match="holds another run"):
        study(recipe_file(changed), tmp_path / "cut", resume=True)


def test_the_record_is_written_after_every_run(recipe_file, tmp_path, monkeypatch):
    from mambacus.synthetic.runs import Laboratory

    carry_out = Laboratory.carry_out

    def stops_at_the_first_seed(self, run):
        if not run.tuning:
            raise KeyboardInterrupt
        return carry_out(self, run)

    monkeypatch.setattr(Laboratory, "carry_out", stops_at_the_first_seed)
    with pytest.raises(KeyboardInterrupt):
        study(recipe_file(shrunk("wordproblems")), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "record.json").read_text())["results"]
    assert found["runs"] == {"planned": 8, "finished": 4}
    assert (len(found["tuning"]), found["rows"]) == (4, [])
    assert {verdict["text"] for verdict in found["verdicts"]} == {"not run yet"}


def test_the_rate_of_the_smallest_loss_is_taken_and_divergence_counts():
    tried = [
        {"task": "t", "key": "mamba-d16", "learning_rate": rate, "valid_loss": loss, "diverged": loss == "nan"}
        for rate, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, "nan"))
    ]
    assert best_rate(tried) == 1e-3
    with pytest.raises(UserError, match=r"task t, mamba-d16: every rate diverged \(0.01\)"):
        best_rate(tried[2:])


def test_a_dry_run_prints_the_budget_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    controlled.main(["mqar", "--dry-run"])
    printed = capsys.readouterr().out
    assert "predictions, written down before any run" in printed
    assert "mamba-d64" in printed and "PFLOP" in printed
    assert "in all: 24 runs, 1,576 M tokens" in printed  # 4 arms, 3 rates and 3 seeds; 8000 * 16 * 513 tokens each
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(task=[]), "unknown key 'task'; did you mean 'tasks'"),
        (lambda r: r.pop("predictions"), "missing predictions"),
        (lambda r: r["arms"].pop("parameters"), "arms: missing parameters"),
        (lambda r: r["arms"].update(d_state=[4, 4]), "d_state 4 is given more than once"),
        (lambda r: r["training"].update(learning_rates=["fast"]), "key 'learning_rates': expected float"),
        (lambda r: r["training"].update(batch=0), "training: --batch: expected 1 or more"),
        (lambda r: r["tasks"][0].update(kind="mqr"), r"tasks\[0\]: kind: expected one of .*did you mean 'mqar'"),
        (lambda r: r["tasks"][0].update(train_x=[0]), "train_x: expected pairs from 1 to 128, got 0"),
        (lambda r: r["tasks"][0].update(steps=0), r"tasks\[0\]: --steps: expected 1 or more"),
        (lambda r: r["tasks"].append(r["tasks"][0]), "expected different names, got mqar, mqar"),
        (lambda r: r["predictions"][0].update(expects="mamba_wins"), "expects: expected one of mamba_lower"),
        (lambda r: r["predictions"][0].update(task="mqa"), "task: expected one of mqar, got 'mqa'"),
        (lambda r: r["predictions"][0].update(x=[7]), "mqar is tested at 8, 16, 32, 64, 128, not at 7"),
        (lambda r: r["predictions"][0].pop("d_state"), "missing d_state: the study has Mamba arms with 4, 16, 64"),
        (lambda r: r["predictions"][0].update(against_d_state=4), "compares an arm with itself"),
        (lambda r: r["predictions"][0].update(d_state=5), "d_state: expected one of 4, 16, 64, got 5"),
    ],
)
def test_bad_recipes_are_one_line(change, message):
    content = loaded("mqar")
    change(content)
    with pytest.raises(UserError, match=message) as caught:
        make_recipe("bad", content, "recipe bad.yaml")
    assert str(caught.value).startswith("recipe bad.yaml: ")
    assert "\n" not in str(caught.value)


def test_bad_calls_exit_with_2(capsys, tmp_path):
    for argv, message in (
        (["mqra"], "did you mean 'mqar'"),
        ([str(tmp_path / "none.yaml")], "no such recipe"),
        (["mqar", "--limit-steps", "-1"], "--limit-steps: expected 0 or more"),
        (["mqar", "--device", "tpu", "--out", str(tmp_path / "o")], "--device: expected auto, cpu"),
    ):
        assert cli.main(["controlled", *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
