"""The study command with stubbed stages: they write records, touch no model."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import coin, flip, record, texts, write_evaluate, write_record, write_solve

from mambacus import bench, bench_generation, evaluate, finetune, merge, report, solve, study
from mambacus.cli import main
from mambacus.measuring.cases import Case
from mambacus.measuring.journal import RowJournal, journal_path
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record
from mambacus.studies import progress
from mambacus.studies.plan import Step

REAL = {
    "bench": bench,
    "bench generation": bench_generation,
    "evaluate": evaluate,
    "finetune": finetune,
    "merge": merge,
    "solve": solve,
    "report": report,
}
RECIPE = """
title: A stubbed study
models:
  - {label: m, source: tiny}
finetune:
  - {label: lora, data: "wordproblems:10"}
evaluate: {tasks: [text_sample]}
solve: {bench: [wordproblems], limit: 60}
check_attached: true
"""
ORDER = ["evaluate m", "solve m", "finetune m+lora", "merge m+lora", "evaluate m+lora", "solve m+lora",
         "solve m+lora (attached)"]  # fmt: skip


class Stubs:
    """Commands that write synthetic records with the configuration they were called with."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.configs: list[Any] = []
        self.fail_at = ""
        self.error: Exception = UserError("no space left on device")

    def module(self, verb: str) -> Any:
        if verb == "report":  # the real one, without the figures: those are tests/test_report.py's
            draw = lambda config: report.run(dataclasses.replace(config, png=None))  # noqa: E731
            return types.SimpleNamespace(Config=report.Config, run=draw)
        return types.SimpleNamespace(Config=REAL[verb].Config, run=lambda config: self.run(verb, config))

    def run(self, verb: str, config: Any) -> Any:
        label = getattr(config, "label", None) or Path(config.out).name
        name = f"{verb} {label}"
        if name == self.fail_at:
            raise self.error
        self.calls.append(name)
        self.configs.append(config)
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        tuned = "+lora" in label
        if verb == "solve":
            right = flip(coin(60, 0.1, 1), 30, 0) if tuned else coin(60, 0.1, 1)
            path = write_solve(config.out, label, {"wordproblems": right})
        elif verb == "evaluate":
            items = {"text_sample": {"word_perplexity": texts(30, 4.0, 2, shift=0.01 if tuned else 0.0)}}
            path = write_evaluate(config.out, label, items)
        else:
            path = Path(config.out) / "record.json"
            results = (
                {"train": {}, "parameters": {}, "data": {}, "history": []}
                if verb == "finetune"
                else {"gate": {"prompts": 1, "max_logit_difference": 0.0, "tolerance": 1e-4}, "untied": False}
            )
            write_record(path, record(verb, label, settings, results))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_record(path, dataclasses.replace(read_record(path), config=settings, started_at=now, seconds=0.0))
        return read_record(path)


@pytest.fixture
def stubs(monkeypatch):
    made = Stubs()
    monkeypatch.setattr(study, "command", made.module)
    return made


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def run_study(recipe: Path, out: Path, *flags: str) -> int:
    return main(["study", str(recipe), "--out", str(out), *flags])


def test_all_stages_run_in_order_and_the_page_is_drawn(stubs, recipe, tmp_path, capsys):
    assert run_study(recipe, tmp_path / "s") == 0
    assert stubs.calls == ORDER
    ledger = read_record(tmp_path / "s" / "study.json")
    assert all(step["done"] for step in ledger.results["steps"])
    found = read_record(tmp_path / "s" / "report.json").results
    assert [row["verdict"] for row in found["comparisons"]] == ["better", "worse"]
    assert "all of their answers are equal" in found["checks"][0]
    out = capsys.readouterr().out
    assert "+50.0 points" in out and "report.html" in out
    assert "A stubbed study" in (tmp_path / "s" / "report.html").read_text()


def test_resume_runs_only_what_is_missing(stubs, recipe, tmp_path):
    stubs.fail_at = "evaluate m+lora"
    assert run_study(recipe, tmp_path / "s") == 2
    assert stubs.calls == ORDER[:4]
    stubs.fail_at = ""
    assert run_study(recipe, tmp_path / "s", "--resume") == 0
    assert stubs.calls == ORDER
    assert run_study(recipe, tmp_path / "s", "--resume") == 0
    assert stubs.calls == ORDER


def test_a_failing_stage_is_named_with_the_way_on(stubs, recipe, tmp_path, capsys):
    stubs.fail_at = "merge m+lora"
    assert run_study(recipe, tmp_path / "s") == 2
    error = capsys.readouterr().err
    assert "stage merge: merge m+lora: no space left on device" in error and "--resume" in error
    assert error.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback_and_names_the_stage(stubs, recipe, tmp_path):
    stubs.fail_at, stubs.error = "solve m", ValueError("broken")
    with pytest.raises(ValueError, match="broken") as caught:
        run_study(recipe, tmp_path / "s")
    assert "in stage baseline: solve m" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("owner/orca", "--data owner/orca: no such file, and not to be had from the hub"),
        ("none.jsonl", "cannot read none.jsonl"),
        ("gsm8k", "the math set 'gsm8k'"),
    ],
)
def test_training_data_is_looked_for_before_the_baselines_run(
    stubs, recipe, tmp_path, capsys, monkeypatch, data, words
):
    def unreachable(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    recipe.write_text(RECIPE.replace("wordproblems:10", data))
    assert run_study(recipe, tmp_path / "s") == 2
    assert words in capsys.readouterr().err
    assert stubs.calls == []


def test_without_resume_nothing_is_touched(stubs, recipe, tmp_path, capsys):
    assert run_study(recipe, tmp_path / "s") == 0
    assert run_study(recipe, tmp_path / "s") == 2
    assert "add --resume" in capsys.readouterr().err
    assert stubs.calls == ORDER


def test_a_moved_study_is_still_recognised(stubs, recipe, tmp_path):
    assert run_study(recipe, tmp_path / "s") == 0
    (tmp_path / "s").rename(tmp_path / "t")
    assert run_study(recipe, tmp_path / "t", "--resume") == 0
    assert stubs.calls == ORDER


def test_changed_settings_are_refused_not_mixed(stubs, recipe, tmp_path, capsys):
    assert run_study(recipe, tmp_path / "s") == 0
    recipe.write_text(RECIPE.replace("limit: 60", "limit: 61"))
    assert run_study(recipe, tmp_path / "s", "--resume") == 2
    error = capsys.readouterr().err
    assert "made with other settings (limit); remove" in error and "solve/m.json" in error
    assert stubs.calls == ORDER


def test_a_result_older_than_what_it_is_made_from_is_refused(stubs, recipe, tmp_path, capsys):
    assert run_study(recipe, tmp_path / "s") == 0
    made = tmp_path / "s" / "merge" / "m+lora" / "record.json"
    later = json.loads(made.read_text()) | {"started_at": "2030-01-01T00:00:00+00:00"}
    made.write_text(json.dumps(later))
    assert run_study(recipe, tmp_path / "s", "--resume") == 2
    assert "is older than" in capsys.readouterr().err


def test_a_result_whose_origin_is_gone_is_refused(stubs, recipe, tmp_path, capsys):
    assert run_study(recipe, tmp_path / "s") == 0
    (tmp_path / "s" / "merge" / "m+lora" / "record.json").unlink()
    assert run_study(recipe, tmp_path / "s", "--resume") == 2
    assert "which is gone" in capsys.readouterr().err


def test_killed_attempts_are_continued_or_cleared(stubs, recipe, tmp_path):
    stubs.fail_at = "finetune m+lora"
    assert run_study(recipe, tmp_path / "s") == 2
    (tmp_path / "s" / "finetune" / "m+lora").mkdir(parents=True)
    (tmp_path / "s" / "finetune" / "m+lora" / "run.json").write_text("{}")
    (tmp_path / "s" / "merge" / "m+lora").mkdir(parents=True)
    (tmp_path / "s" / "merge" / "m+lora" / "half.safetensors").write_text("")
    stubs.fail_at = ""
    assert run_study(recipe, tmp_path / "s", "--resume") == 0
    configs = dict(zip(stubs.calls, stubs.configs, strict=True))
    assert configs["finetune m+lora"].resume
    assert configs["solve m+lora"].overwrite
    assert not (tmp_path / "s" / "merge" / "m+lora" / "half.safetensors").exists()


def test_a_killed_benchmark_keeps_its_finished_rows(tmp_path):
    config = bench.Config("train", tmp_path / "bench" / "1-train.json")  # a folder that nobody has made
    case = Case("train", "mambacus", "micro", "float32", 1, 8)
    path = journal_path(config.out)
    RowJournal(path, resume=False, overwrite=False).add(case, {"median_ms": 1.0})
    again = progress.prepare(Step("bench", "bench", "train", config, config.out))
    kept = RowJournal(path, resume=again.resume, overwrite=again.overwrite)
    assert kept.find(case) == {"median_ms": 1.0}
    generation = bench_generation.Config("tiny", tmp_path / "g.json")
    assert progress.prepare(Step("bench", "bench generation", "tiny", generation, generation.out)).overwrite


def test_stand_ins_and_limits_reach_the_page(stubs, recipe, tmp_path):
    assert run_study(recipe, tmp_path / "s", "--models", "random:micro", "--limit", "7") == 0
    page = (tmp_path / "s" / "report.html").read_text()
    assert "random:micro is no model of the recipe" in page
    assert "--limit 7: 7 documents a task" in page
    assert all(config.limit == 7 for config in stubs.configs if hasattr(config, "limit"))


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["study", "cs5242", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in (
        *("baseline", "merge", "bench", "report", "--targets x_proj,embeddings,in_proj,out_proj", "GB of weights"),
        "downloads from the hub unless cached: EleutherAI/gpt-neo-2.7B (10.7 GB)",
        "data from the hub unless cached: microsoft/orca-math-word-problems-200k (about 84 MB)",
        "data from the hub unless cached: Rowan/hellaswag (about 37 MB)",
        "data in all: about 0.48 GB; sizes are approximate",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_estimates_every_step_and_shows_what_finished_ones_took(stubs, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run_study(recipe, tmp_path / "s") == 0
    steps = read_record(tmp_path / "s" / "study.json").results["steps"]
    assert all(step["estimate"]["seconds"] > 0 and step["seconds"] == 0 for step in steps)
    assert run_study(recipe, tmp_path / "s", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Estimated for this machine (CPU" in out and "took" in out and "An estimate" in out
    assert run_study(recipe, tmp_path / "t", "--dry-run", "--models", "nobody/unknown") == 0
    out = capsys.readouterr().out
    assert "unknown: shape of nobody/unknown" in out and "without what is unknown" in out
    assert run_study(recipe, tmp_path / "t", "--dry-run", "--models", "./nowhere") == 2
    assert "model './nowhere': no such folder" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_plan_is_laid_out_without_torch():
    code = (
        "import sys; from mambacus.study import Config, prepare; import mambacus.study_estimate; "
        "import mambacus.studies.estimate; prepare(Config('cs5242')); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (("source: tiny", "source: nowhere/at/all"), [], "model 'nowhere/at/all': no such folder"),
        (("source: tiny", 'source: "random:7b"'), [], "expected random:SIZE"),
        (("source: tiny", "source: {gpt2}"), [], "model m: fine-tuning needs a Mamba model"),
        (("", ""), ["--device", "gpu"], "stage baseline: evaluate m: --device: expected auto, cpu, cuda or cuda:N"),
        (("data: ", "method: lorra, data: "), [], "stage finetune: finetune m+lora: --method: expected one of"),
        (("wordproblems:10", "wordprblems:10"), [], "did you mean 'wordproblems'"),
        (("wordproblems:10", "{broken}"), [], "broken.jsonl, line 2: not valid JSON"),
        (("wordproblems:10", "gone.jsonl"), [], "cannot read gone.jsonl"),
        (("[wordproblems]", "[gsm8k]"), [], "stage baseline: solve m: --data-dir: missing"),
        (("[wordproblems]", "[gsm8k]"), ["--data-dir", "{empty}"], "expected a file"),
        (
            ("[text_sample]", "[text_sampel]"),
            ["--data-dir", "{empty}"],
            "evaluate m: --tasks: unknown task 'text_sampel'; did",
        ),
    ],
)
def test_what_would_stop_it_after_hours_is_found_first(tmp_path, monkeypatch, capsys, change, flags, words):
    places = {name: tmp_path / name for name in ("gpt2", "empty", "broken.jsonl")}
    places["gpt2"].mkdir()
    places["empty"].mkdir()
    (places["gpt2"] / "config.json").write_text('{"model_type": "gpt2"}')
    places["broken.jsonl"].write_text('{"question": "q", "answer": "1"}\n{"question":\n')
    paths = {name.removesuffix(".jsonl"): path for name, path in places.items()}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace(change[0], change[1].format(**paths)) if change[0] else RECIPE)
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(recipe), "--out", "s", *(flag.format(**paths) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.yaml"], "no such recipe: none.yaml"),
        (["demo", "--models", "tinny"], "did you mean 'tiny'"),
        (["demo", "--limit", "-1"], "--limit: expected 0 or more"),
        (["demo", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    ],
)
def test_faults_are_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_study_is_found_finished(tmp_path):
    """With the commands themselves: what they fill in must not look like other settings when the study is resumed."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "title: small\n"
        "models: [{label: m, source: 'random:micro'}]\n"
        "finetune: [{label: lora, method: lora, data: 'wordproblems:8', max_steps: 2, batch_size: 2}]\n"
        "merge: {dtype: float32}\n"
        "solve: {bench: [wordproblems], limit: 2, max_new_tokens: 4}\n"
        "bench: [{what: train, model: micro, seqlens: [8], implementations: [mambacus], repeats: 1}]\n"
    )
    assert run_study(recipe, tmp_path / "s", "--device", "cpu") == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.json") if path.name != "study.json"}
    (tmp_path / "s" / "report.json").unlink()
    (tmp_path / "s" / "report.html").unlink()
    assert run_study(recipe, tmp_path / "s", "--resume", "--device", "cpu") == 0
    records = [path for path in made if path.parent.name in ("solve", "bench", "m+lora") and path.name != "report.json"]
    assert len(records) >= 5 and all(path.stat().st_mtime_ns == made[path] for path in records)
