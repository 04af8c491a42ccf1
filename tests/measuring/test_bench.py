"""`mambacus bench` measures both sides the same way and records failures as results."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from mambacus import bench
from mambacus.cli import main
from mambacus.measuring import cases, journal, timing, worker
from mambacus.measuring.kept import KeptProcess, Measurer
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record

SMALL = {"model": "micro", "repeats": 1, "warmup": 0}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[cases.Case]:
    """Measure without starting a process for each case; return the cases as they come."""
    measured = []

    def measure(case: cases.Case, timeout: float) -> dict:
        measured.append(case)
        return dataclasses.asdict(case) | worker.measure(case)

    monkeypatch.setattr(cases, "measure", measure)
    return measured


def test_sizes_are_those_that_can_be_made():
    from mambacus.models.registry import RANDOM_SIZES

    fields = {field.name: field.metadata for field in dataclasses.fields(bench.Config)}
    assert fields["model"]["choices"] == tuple(RANDOM_SIZES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "4,0"], "--batches: expected 1 or more, got 0"),
        (["--repeats", "0"], "--repeats: expected 1 or more, got 0"),
        (["--timeout", "nan"], "--timeout: expected more than 0, got nan"),
        (["--dtypes", "float23"], "--dtypes: expected one of float32, bfloat16, float16, mixed, int8, int4, got"),
        (["--implementations", "pythia"], "got 'pythia'"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--modes", "graph"], "--modes graph: expected with --device cuda, got cpu"),
        (["--model", "7b"], "--model: expected one of micro, tiny, 130m"),
        (["--what", "train"], "unknown flag --what"),
        (["--prompts", "8"], "--prompts: expected with decode, not with train"),
        (["--logits", "all"], "--logits: expected with decode, prefill, lengths, not with train"),
    ],
)
def test_faults_are_one_line(tmp_path, capsys, flags, message):
    assert main(["bench", "train", "--out", str(tmp_path / "r.json"), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    from mambacus.measuring import sides

    monkeypatch.setitem(sides._PACKAGES, "llama.cpp", {"no_such_module": "llama-cpp-python", "json": "gguf"})
    flags = ["--implementations", "mambacus,llama.cpp"]
    assert main(["bench", "decode", "--model", "micro", "--out", str(tmp_path / "r.json"), *flags]) == 2
    error = capsys.readouterr().err
    assert "llama-cpp-python not installed; pip install 'mambacus[peers]'" in error and error.count("\n") == 1


def test_a_record_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "r.json").write_text("precious")
    places = {"r.json": "add --overwrite", ".": "expected a file", "r.json/x.json": "expected a folder"}
    for out, message in places.items():
        assert main(["bench", "train", "--model", "micro", "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "precious"


def test_every_case_has_a_process_of_its_own(tmp_path, capsys):
    out = tmp_path / "r.json"
    bench.main(["train", "--model", "micro", "--seqlens", "8", "--repeats", "1", "--warmup", "0",
                "--implementations", "mambacus", "--out", str(out)])  # fmt: skip
    (row,) = read_record(out).results["rows"]
    assert row["tokens_per_second"] > 0 and row["flops"] > 0
    assert row["peak_memory_bytes"] >= row["weights_memory_bytes"] > 0
    assert row["peak_memory_of"] in ("steps", "process")
    assert row["of_least"] > 0 and row["least_ms"] > 0
    assert "tok/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_decode_has_its_parts_its_whole_and_its_samples(tmp_path, in_this_process):
    config = bench.Config(
        "decode", tmp_path / "r.json", implementations=("mambacus", "transformers", "pythia-micro"), prompts=(8,),
        new_tokens=(3,), samples=4, **SMALL,
    )  # fmt: skip
    rows = bench.run(config).results["rows"]
    kinds = [row["benchmark"] for row in rows]
    assert kinds == [kind for kind in ("prefill", "decode", "generate", "samples") for _ in range(3)]
    for row in rows:
        assert row["state_bytes"] > 0 and row["weights_bytes"] > 0 and row["least_ms"] > 0
        assert ("time_to_first_token_ms" in row) == (row["benchmark"] == "generate")
    ours, *peers = rows[9:]
    assert ours["prompt_tokens"] == 8  # the prompt is read once for all samples
    assert ours["ratio_to_decode"] > 0 and ours["decode_alone_ms"] > 0
    assert [row["prompt_tokens"] for row in peers] == [32, 32]


def test_lengths_finds_crossovers(tmp_path, in_this_process, capsys):
    bench.main(["lengths", "--model", "micro", "--seqlens", "8,16", "--new-tokens", "2", "--repeats", "1",
                "--warmup", "0", "--out", str(tmp_path / "r.json")])  # fmt: skip
    results = read_record(tmp_path / "r.json").results
    assert {row["implementation"] for row in results["rows"]} == {"mambacus", "pythia-micro"}
    assert len(results["rows"]) == 2 * 2 * 3
    assert results["ran_on"]["backends"]["selective_scan"] == {"name": "cpu", "reason": "cpu device"}
    compared = {(entry["benchmark"], entry["metric"]) for entry in results["crossovers"]}
    assert ("decode", "state_bytes") in compared and ("train", "tokens_per_second") in compared
    assert "state_bytes: " in capsys.readouterr().out


def test_lora_says_where_it_sits(tmp_path, in_this_process):
    rows = bench.run(bench.Config("train", tmp_path / "r.json", seqlens=(8, 16), method="lora", **SMALL)).results[
        "rows"
    ]
    assert [row["lora_targets"] for row in rows[:2]] == [["in_proj", "out_proj"], ["in_proj"]]
    assert all(row["method"] == "lora" for row in rows)


def test_a_stopped_run_goes_on(tmp_path, in_this_process, monkeypatch):
    config = bench.Config("train", tmp_path / "r.json", implementations=("mambacus",), seqlens=(8, 16), **SMALL)
    usual = cases.measure

    def stop_at_the_second(case: cases.Case, timeout: float) -> dict:
        if in_this_process:
            raise KeyboardInterrupt
        return usual(case, timeout)

    monkeypatch.setattr(cases, "measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.run(config)
    monkeypatch.setattr(cases, "measure", usual)
    kept = journal.journal_path(config.out)
    with kept.open("a") as file:
        file.write('{"case": "half a li')  # as a kill leaves it
    with pytest.raises(UserError, match="add --resume to go on or --overwrite to start again"):
        bench.run(config)
    first = json.loads(kept.read_text().splitlines()[0])["row"]
    rows = bench.run(dataclasses.replace(config, resume=True)).results["rows"]
    assert [case.seqlen for case in in_this_process] == [8, 16]  # the first was not measured again
    assert rows[0] == first and [row["seqlen"] for row in rows] == [8, 16]
    assert not kept.exists()


def test_tokens_counted():
    assert cases.Case("train", "mambacus", "130m", "float32", 2, 256).tokens == 512
    assert cases.Case("decode", "mambacus", "130m", "float32", 16, 8, new_tokens=4).tokens == 64
    assert cases.Case("samples", "mambacus", "130m", "float32", 1, 512, new_tokens=4, samples=64).tokens == 256


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (cases.Case("train", "llama.cpp", "micro", "float32", 1, 8), "not at train"),
        (cases.Case("train", "mambacus", "micro", "int8", 1, 8), "for inference on a CPU"),
        (cases.Case("prefill", "mambacus", "micro", "mixed", 1, 8), "mixed is training under autocast"),
        (cases.Case("decode", "transformers", "micro", "mixed", 1, 8), "mixed is training under autocast"),
        (cases.Case("generate", "pythia-micro", "micro", "mixed", 1, 8), "mixed is training under autocast"),
        (cases.Case("decode", "llama.cpp", "micro", "float32", 1, 8, device="cuda"), "on the CPU only"),
        (cases.Case("decode", "transformers", "micro", "int4", 1, 8), "not measured in int4, only in float32"),
        (cases.Case("prefill", "transformers", "micro", "float32", 1, 8, graph=True), "not compiled"),
        (cases.Case("decode", "gpt-neo-125m", "micro", "float32", 1, 8, graph=True), "does not compile GPT-Neo"),
    ],
)
def test_what_cannot_be_measured_is_a_row_that_says_so(case, reason):
    assert reason in cases.measure(case, timeout_seconds=0.001)["error"]


def test_time_out_is_a_result():
    row = cases.measure(cases.Case("train", "mambacus", "micro", "float32", 1, 8), timeout_seconds=0.01)
    assert row["error"].startswith("not finished after")


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (-9, "", "out of memory"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", "out of memory"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9", "out of memory"),
    ],
)  # fmt: skip
def test_out_of_memory_is_a_result(monkeypatch, code, stderr, error):
    import subprocess

    done = subprocess.CompletedProcess([], code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert cases.measure(cases.Case("train", "mambacus", "micro", "float32", 1, 8), 9.0)["error"] == error


def test_a_broken_case_is_an_error():
    with pytest.raises(UserError, match=r"train nosuch float32 1 x 8 mambacus: model 'random:nosuch': expected"):
        cases.measure(cases.Case("train", "mambacus", "nosuch", "float32", 1, 8), timeout_seconds=250)


def test_timing_drops_the_warm_up():
    import torch

    calls = []
    samples = timing.time_ms(lambda: calls.append(1), torch.device("cpu"), repeats=3, warmup=2)
    assert len(samples) == 3
    assert len(calls) == 5


def test_one_process_measures_case_after_case():
    kept = KeptProcess()
    try:
        first = kept.measure(cases.Case("prefill", "mambacus", "micro", "float32", 1, 8, repeats=1), 250)
        process = kept._process
        assert process is not None and first["tokens_per_second"] > 0 and "gave_memory_back" not in first
        second = kept.measure(cases.Case("prefill", "mambacus", "micro", "float32", 1, 16, repeats=1), 250)
        assert kept._process is process and second["seqlen"] == 16 and "error" not in second
        with pytest.raises(UserError, match=r"prefill nosuch float32 1 x 8 mambacus: model 'random:nosuch': expected"):
            kept.measure(cases.Case("prefill", "mambacus", "nosuch", "float32", 1, 8), 250)
        assert process.poll() is not None
        third = kept.measure(cases.Case("prefill", "mambacus", "micro", "float32", 1, 8, repeats=1), 250)
        assert kept._process is not process and "error" not in third
        fresh = kept._process
        late = kept.measure(cases.Case("train", "mambacus", "tiny", "float32", 8, 512), 0.01)
        assert late["error"].startswith("not finished after") and fresh.poll() is not None
    finally:
        kept.close()


def test_a_kept_process_that_is_killed_ran_out_of_memory():
    kept = KeptProcess()
    case = cases.Case("prefill", "mambacus", "micro", "float32", 1, 8, repeats=1)
    try:
        process = kept._running(0)
        threading.Timer(0.5, process.kill).start()
        assert kept.measure(case, 250)["error"] == "out of memory"
        assert "error" not in kept.measure(case, 250)  # in a new one
    finally:
        kept.close()


def test_cases_on_a_gpu_share_a_process_and_others_do_not(monkeypatch):
    asked = []
    monkeypatch.setattr(cases, "measure", lambda case, timeout: asked.append(("own", case.device)) or {})
    monkeypatch.setattr(KeptProcess, "measure", lambda self, case, timeout: asked.append(("kept", case.device)) or {})
    with Measurer() as measurer:
        for device in ("cpu", "cuda", "cuda:1"):
            measurer.measure(cases.Case("prefill", "mambacus", "micro", "float32", 1, 8, device=device), 1.0)
    assert asked == [("own", "cpu"), ("kept", "cuda"), ("kept", "cuda:1")]
