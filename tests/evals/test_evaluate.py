"""``mambacus evaluate`` from flags to record: ours against transformers on one checkpoint, baselines, faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mambacus import cli, evaluate
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, read_jsonl, read_record

TASKS = ("arc_easy", "cola", "lambada_openai", "winogrande", "gsm8k", "hellaswag")


def config(folder: Path, data: Path | None, out: Path, **options: Any) -> evaluate.Config:
    defaults: dict[str, Any] = {"limit": 3, "num_fewshot": 0, "max_length": 512, "bootstrap_iters": 20, "device": "cpu"}
    return evaluate.Config(
        **(defaults | {"model": str(folder), "tasks": TASKS, "data_dir": data, "out": out} | options)
    )


@pytest.fixture(scope="module")
def ours(checkpoint: Any, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    out = tmp_path_factory.mktemp("ours") / "record.json"
    return out, evaluate.run(config(checkpoint.folder, small_data, out, label="micro"))


def test_record_and_items_are_as_documented(ours: tuple[Path, Record]) -> None:
    out, record = ours
    assert read_record(out).results["tasks"] == record.results["tasks"]
    assert (record.kind, record.label, record.items_file) == ("evaluate", "micro", "record.items.jsonl")
    tasks = record.results["tasks"]
    assert {task: set(metrics) for task, metrics in tasks.items()} == {
        "arc_easy": {"acc", "acc_norm"},
        "cola": {"mcc"},
        "lambada_openai": {"perplexity", "acc"},
        "winogrande": {"acc"},
        "gsm8k": {"exact_match,strict-match", "exact_match,flexible-extract"},
        "hellaswag": {"acc", "acc_norm"},
    }
    for metrics in tasks.values():
        for score in metrics.values():
            assert set(score) == {"value", "stderr", "n", "higher_is_better"}
            assert score["n"] == 3
    assert tasks["lambada_openai"]["perplexity"]["higher_is_better"] is False
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= set(
        record.results["lm_eval"]
    )
    assert "samples" not in record.results["lm_eval"]
    reuse = record.results["state_reuse"]
    assert reuse["enabled"] and reuse["tokens_saved"] > 0
    assert 0 < record.results["seconds"]["answering"] < record.seconds


def test_items_give_back_the_scores(ours: tuple[Path, Record]) -> None:
    import math

    out, record = ours
    items = [item for _, item in read_jsonl(out.with_name("record.items.jsonl"))]
    assert {(item["task"], item["doc_id"]) for item in items} == {(task, n) for task in TASKS for n in range(3)}
    arc = [item["metrics"]["acc"] for item in items if item["task"] == "arc_easy"]
    assert sum(arc) / 3 == record.results["tasks"]["arc_easy"]["acc"]["value"]
    lambada = [item["metrics"]["perplexity"] for item in items if item["task"] == "lambada_openai"]
    assert math.exp(-sum(pair[0] for pair in lambada) / sum(pair[1] for pair in lambada)) == pytest.approx(
        record.results["tasks"]["lambada_openai"]["perplexity"]["value"]
    )
    assert all(len(item["metrics"]["mcc"]) == 2 for item in items if item["task"] == "cola")


def test_scores_are_those_of_transformers(
    ours: tuple[Path, Record], checkpoint: Any, small_data: Path, tmp_path: Path, no_network: None
) -> None:
    forced = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "hf.json", implementation="hf"))
    for task, metrics in ours[1].results["tasks"].items():
        for metric, score in metrics.items():
            assert score["value"] == pytest.approx(forced.results["tasks"][task][metric]["value"], rel=1e-5), (
                task,
                metric,
            )
    assert forced.results["state_reuse"] == {"enabled": False}


def test_without_state_reuse_nothing_changes_but_the_work(
    ours: tuple[Path, Record], checkpoint: Any, small_data: Path, tmp_path: Path
) -> None:
    tasks = ("arc_easy", "cola")
    whole = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "r.json", state_reuse=False, tasks=tasks))
    for task in tasks:
        assert whole.results["tasks"][task] == ours[1].results["tasks"][task]
    reuse = whole.results["state_reuse"]
    assert reuse["tokens_read"] == reuse["tokens_naive"] and not reuse["enabled"]


def test_the_source_of_worked_examples_is_named(checkpoint: Any, small_data: Path, tmp_path: Path) -> None:
    record = evaluate.run(
        config(checkpoint.folder, small_data, tmp_path / "r.json", tasks=("cola", "winogrande"), num_fewshot=1, limit=1)
    )
    assert record.results["fewshot_split"] == {"cola": "train", "winogrande": "validation"}


def test_packaged_text_needs_no_data_folder(checkpoint: Any, tmp_path: Path, no_network: None) -> None:
    record = evaluate.run(
        config(checkpoint.folder, None, tmp_path / "r.json", tasks=("text_sample",), limit=1, num_fewshot=None)
    )
    assert record.results["tasks"]["text_sample"]["word_perplexity"]["value"] > 1


def test_another_architecture_is_a_baseline(
    checkpoint: Any, small_data: Path, tmp_path: Path, no_network: None
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "neox"
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=512, max_position_embeddings=512, **shape)).save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    record = evaluate.run(config(folder, small_data, tmp_path / "r.json", tasks=("arc_easy", "cola"), max_length=None))
    assert record.label == "neox"
    assert record.results["lm_eval"]["config"]["model_num_parameters"] > 0  # lm_eval's own model says so
    with pytest.raises(UserError, match=r"runs Mamba models, .* is of type 'gpt_neox'"):
        evaluate.run(config(folder, small_data, tmp_path / "s.json", implementation="mambacus"))


def test_the_same_examples_for_every_document(checkpoint: Any, small_data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("arc_easy",), "num_fewshot": 2, "limit": 6, "max_length": 2048}
    fixed = {"fewshot_sampler": "first_n"}
    shared = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "a.json", **options, **fixed))
    whole = evaluate.run(
        config(checkpoint.folder, small_data, tmp_path / "b.json", **options, **fixed, state_reuse=False)
    )
    assert shared.results["tasks"] == whole.results["tasks"]
    assert shared.results["state_reuse"]["prefixes"] >= 1
    drawn = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "c.json", **options))
    assert drawn.results["state_reuse"]["prefixes"] == 0
    tokens = {name: run.results["state_reuse"]["tokens_read"] for name, run in (("shared", shared), ("drawn", drawn))}
    assert tokens["shared"] * 2 < tokens["drawn"]


def test_an_interrupted_run_goes_on_where_it_was(
    checkpoint: Any, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.evals.scoring import Scorer

    options: dict[str, Any] = {"tasks": ("arc_easy", "gsm8k"), "cache": tmp_path / "cache", "batch_size": 2}
    plain = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "a.json", tasks=options["tasks"]))
    batches = []
    read = Scorer._prefill

    def interrupted(self: Any, *arguments: Any) -> Any:
        batches.append(1)
        if len(batches) > 1:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(Scorer, "warm_up", lambda self: None)
    monkeypatch.setattr(Scorer, "_prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config(checkpoint.folder, small_data, tmp_path / "b.json", **options))
    monkeypatch.undo()
    resumed = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "b.json", **options))
    assert resumed.results["tasks"] == plain.results["tasks"]
    counts = [run.results["state_reuse"]["requests"] for run in (plain, resumed)]
    assert 0 < counts[1] < counts[0]
    with monkeypatch.context() as patched:
        patched.delattr(evaluate, "_warm_up")  # nothing is read where every answer is known
        again = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "c.json", **options))
    assert again.results["tasks"] == plain.results["tasks"]
    assert again.results["state_reuse"]["requests"] == 0
    other = evaluate.run(config(checkpoint.folder, small_data, tmp_path / "d.json", **options, max_length=300))
    assert other.results["state_reuse"]["requests"] == counts[0]


def test_two_processes_give_the_numbers_of_one(
    ours: tuple[Path, Record], checkpoint: Any, small_data: Path, tmp_path: Path
) -> None:
    flags = [
        "--model", str(checkpoint.folder), "--tasks", ",".join(TASKS), "--data-dir", str(small_data), "--limit", "3",
        "--num-fewshot", "0", "--max-length", "512", "--bootstrap-iters", "20", "--device", "cpu",
    ]  # fmt: skip
    # --multi_gpu is accelerate's way to say "one process each"; --device cpu then decides what they run on
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    out = tmp_path / "two.json"
    ended = subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "mambacus", "evaluate", *flags, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = read_record(out)
    assert found.results["processes"] == 2
    assert found.results["tasks"] == ours[1].results["tasks"]
    items = [[item for _, item in read_jsonl(path.with_name(f"{path.stem}.items.jsonl"))] for path in (out, ours[0])]
    assert [(item["task"], item["doc_id"]) for item in items[0]] == [
        (item["task"], item["doc_id"]) for item in items[1]
    ]
    assert ended.stdout.count("record: ") == 1


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["evaluate", *arguments])
    return status, capsys.readouterr().err


def test_nothing_is_overwritten(
    ours: tuple[Path, Record], small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = ours
    before = out.read_bytes()
    status, message = run_cli("--model", "random:micro", "--tasks", "cola", "--out", str(out), capsys=capsys)
    assert status == 2 and "exists already; add --overwrite" in message
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "random:micro", "--tasks", "helaswag"], "unknown task 'helaswag'; did you mean 'hellaswag'?"),
        (["--model", "absent/../folder", "--tasks", "cola"], "no such folder"),
        (["--model", "random:micro", "--tasks", "cola", "--limit", "0"], "--limit: expected 1 or more, got 0"),
        (["--model", "random:micro", "--tasks", "cola", "--device", "cdua"], "--device: expected auto"),
        (["--model", "random:micro", "--tasks", "cola", "--dtype", "float31"], "--dtype: expected one of"),
        (["--model", "random:micro", "--tasks", "cola", "--implementation", "hf"], "needs a model folder"),
        (["--model", "random:micro", "--tasks", "cola", "--adapter", "absent"], "adapter"),
        (["--tasks", "cola"], "missing --model"),
    ],
)
def test_faults_are_one_line(
    flags: list[str], message: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    status, error = run_cli(*flags, "--out", str(out), "--data-dir", str(small_data), capsys=capsys)
    line = error.strip().splitlines()[-1]
    assert status == 2
    assert line.startswith("mambacus evaluate: error: ") and message in line
    assert not out.exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, mambacus.evaluate, mambacus.solve\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
