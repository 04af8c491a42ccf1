"""`mambacus bench eval`: which cases, and what their rows say of each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from mambacus.bench import Config, run
from mambacus.bench_plan import fill
from mambacus.cli import main
from mambacus.measuring import evaluation
from mambacus.measuring.evaluation import EvalCase, eval_cases, measure_evaluation, summary
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record

SECONDS = {"mambacus": 2.0, "no-state-reuse": 10.0, "hf": 20.0}
READ = {"mambacus": 100, "no-state-reuse": 600}


def made_up(case: EvalCase, *_: Any) -> tuple[dict[str, Any], Any]:
    """A run that was never made: hf answers one document otherwise."""
    name = case.implementation
    row = {"benchmark": "eval", "task": case.task, "num_fewshot": case.num_fewshot, "implementation": name,
           "model": case.model, "documents": case.documents, "seconds": SECONDS[name]}  # fmt: skip
    if name in READ:
        row |= {"tokens_read": READ[name], "tokens_naive": 600, "requests": 4, "generated_tokens": 0}
    items = {n: {"acc": float(n == 0 and name == "hf"), "perplexity": [-5.0, 1]} for n in range(case.documents)}
    return row, items


def test_rows_are_compared_with_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation, "_run", made_up)
    cases = eval_cases("tiny", "cpu", "float32", documents=20, peer_documents=5)[:3]
    assert [case.implementation for case in cases] == ["mambacus", "no-state-reuse", "hf"]
    ours, whole, peer = (row for _, row in measure_evaluation(cases, tmp_path, 1.0))
    assert ours["documents_per_second"] == 10.0 and "speedup" not in ours
    assert (whole["speedup"], whole["tokens_ratio"]) == (5.0, 6.0)
    assert (whole["same_documents"], whole["compared_documents"]) == (20, 20)
    assert peer["speedup"] == 40.0  # a document took it 4 s, us 0.1 s
    assert (peer["same_documents"], peer["compared_documents"]) == (4, 5)
    assert "ours 40.0 x as fast" in summary(peer) and "4 of 5 documents the same" in summary(peer)
    assert whole["tokens_per_second"] == pytest.approx(600 / 10) and whole["seqlen"] == 150


def test_a_case_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def out_of_time(case: EvalCase, *arguments: Any) -> tuple[dict[str, Any], Any]:
        row, items = made_up(case)
        return (row | {"error": "not finished after 1 s"}, {}) if case.implementation == "mambacus" else (row, items)

    monkeypatch.setattr(evaluation, "_run", out_of_time)
    ours, whole, _ = (row for _, row in measure_evaluation(eval_cases("tiny", "cpu", "float32", 4, 2)[:3], tmp_path, 1))
    assert summary(ours).endswith("not finished after 1 s")
    assert whole["documents_per_second"] == 0.4 and "speedup" not in whole


def test_on_a_gpu_the_peer_is_a_transformer_of_that_size() -> None:
    cases = eval_cases("1.4b", "cuda", "bfloat16", documents=500, peer_documents=5)
    assert {(case.task, case.num_fewshot, case.documents, case.model) for case in cases} == {
        ("hellaswag", 10, 500, "random:1.4b")
    }
    assert [case.implementation for case in cases] == ["mambacus", "no-state-reuse", "hf-pythia"]
    assert [case.batch for case in cases] == [512, 64, 64]
    with pytest.raises(UserError, match="--model tiny: expected on a GPU one of 130m"):
        eval_cases("tiny", "cuda", "bfloat16", 1, 1)
    with pytest.raises(UserError, match="--model 130m: expected tiny"):
        eval_cases("130m", "cpu", "float32", 1, 1)


def test_on_a_gpu_ours_runs_once_uncounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = []

    def noted(case: EvalCase, *arguments: Any) -> tuple[dict[str, Any], Any]:
        runs.append((case.implementation, case.documents))
        return made_up(case if case.implementation != "hf-pythia" else dataclasses.replace(case, implementation="hf"))

    monkeypatch.setattr(evaluation, "_run", noted)
    rows = [row for _, row in measure_evaluation(eval_cases("1.4b", "cuda", "bfloat16", 500, 5), tmp_path, 1.0)]
    assert runs == [
        ("mambacus", 500),
        ("mambacus", 500),
        ("no-state-reuse", 500),
        ("hf-pythia", 500),
    ]
    assert [row["documents"] for row in rows] == [500, 500, 500]


def test_a_tuned_model_generates_beside_tiny(tmp_path: Path) -> None:
    cases = eval_cases("tiny", "cpu", "float32", documents=20, peer_documents=5, tuned=tmp_path / "words")
    assert [(case.task, Path(case.model).name) for case in cases[::3]] == [
        ("gsm8k", "tiny"), ("gsm8k", "words"), ("arc_challenge", "tiny"), ("arc_easy", "tiny"), ("hellaswag", "tiny"),
    ]  # fmt: skip
    assert [case.implementation for case in cases[3:6]] == ["mambacus", "no-state-reuse", "hf"]
    with pytest.raises(UserError, match="--tuned words: expected with --device cpu"):
        eval_cases("1.4b", "cuda", "bfloat16", 1, 1, tuned=Path("words"))


@pytest.mark.parametrize(("device", "model", "dtype"), [("cpu", "tiny", "float32"), ("cuda", "1.4b", "bfloat16")])
def test_without_a_model_a_device_gets_one_that_it_can_measure(device: str, model: str, dtype: str) -> None:
    config = fill(Config("eval", Path("r.json"), device=device))
    assert (config.model, config.dtypes) == (model, (dtype,))
    assert eval_cases(config.model or "", device, *config.dtypes, 1, 1)


def test_it_runs_with_the_flags_of_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation, "_run", made_up)
    rows = run(Config("eval", tmp_path / "r.json", data_dir=tmp_path)).results["rows"]
    assert len(rows) == 4 * 3


def test_a_refusal_is_repeated_without_its_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = CompletedProcess([], 2, stdout="", stderr="a warning\nmambacus evaluate: error: --data-dir: no gsm8k\n")
    monkeypatch.setattr(evaluation.subprocess, "run", lambda *args, **kwargs: said)
    (case, *_) = eval_cases("tiny", "cpu", "float32", 4, 2)
    with pytest.raises(UserError) as caught:
        list(measure_evaluation([case], tmp_path, 1.0))
    assert str(caught.value) == "eval gsm8k 5-shot 4 documents mambacus tiny: --data-dir: no gsm8k"


def test_a_folder_of_documents_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "eval", "--model", "tiny", "--out", str(tmp_path / "r.json")]) == 2
    assert "--data-dir: expected the folder of the evaluation files" in capsys.readouterr().err


def test_a_tuned_model_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tuned", str(tmp_path / "none"), "--data-dir", str(tmp_path)]
    assert main(["bench", "eval", *flags, "--out", str(tmp_path / "r.json")]) == 2
    assert "--tuned: expected a model folder" in capsys.readouterr().err


@pytest.mark.slow
def test_measured_for_real(data_dir: Path, tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--documents", "2", "--peer-documents", "1", "--data-dir", str(data_dir)]
    assert main(["bench", "eval", *flags, "--out", str(tmp_path / "r.json")]) == 0
    rows = read_record(tmp_path / "r.json").results["rows"]
    assert len(rows) == 12 and not [row for row in rows if "error" in row]
    assert all(row["same_documents"] == row["compared_documents"] > 0 for row in rows if "speedup" in row)
