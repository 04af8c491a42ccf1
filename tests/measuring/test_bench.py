"""`mambacus bench` measures both sides the same way and records failures as results."""

from __future__ import annotations

import dataclasses

import pytest

from mambacus import bench
from mambacus.cli import main
from mambacus.measuring import cases, timing
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record


def test_plan_alternates_implementations_within_a_shape(tmp_path):
    config = bench.Config(
        "decode", tmp_path / "r.json", batches=(1, 16), dtypes=("float32", "bfloat16"), peer_dtypes=("float32",)
    )
    planned = [(c.benchmark, c.dtype, c.batch, c.implementation) for c in bench.plan(config)]
    assert planned[:4] == [
        ("prefill", "float32", 1, "mambacus"),
        ("prefill", "float32", 1, "transformers"),
        ("prefill", "float32", 16, "mambacus"),
        ("prefill", "float32", 16, "transformers"),
    ]
    assert ("decode", "bfloat16", 1, "transformers") not in planned
    assert len(planned) == 12


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'train'"):
        list(bench.plan(bench.Config("trian", tmp_path / "r.json")))
    with pytest.raises(UserError, match="--implementations: expected one of mambacus, transformers, got 'vllm'"):
        list(bench.plan(bench.Config("train", tmp_path / "r.json", implementations=("vllm",))))
    with pytest.raises(UserError, match="--model: expected one of micro, tiny, 130m"):
        bench.run(bench.Config("train", tmp_path / "r.json", model="7b"))


def test_sizes_and_implementations_are_those_that_can_be_made():
    from mambacus.models.registry import RANDOM_SIZES

    fields = {field.name: field.metadata for field in dataclasses.fields(bench.Config)}
    assert fields["model"]["choices"] == tuple(RANDOM_SIZES)
    assert fields["implementations"]["choices"] == cases.IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "4,0"], "--batches: expected 1 or more, got 0"),
        (["--repeats", "0"], "--repeats: expected 1 or more, got 0"),
        (["--timeout", "nan"], "--timeout: expected more than 0, got nan"),
        (["--dtypes", "float23"], "--dtypes: expected one of float32, bfloat16, float16, mixed, got 'float23'"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--what", "train"], "unknown flag --what"),
    ],
)
def test_faults_are_one_line(tmp_path, capsys, flags, message):
    assert main(["bench", "train", "--model", "micro", "--out", str(tmp_path / "r.json"), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_record_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "r.json").write_text("precious")
    places = {"r.json": "add --overwrite", ".": "expected a file", "r.json/x.json": "expected a folder"}
    for out, message in places.items():
        assert main(["bench", "train", "--model", "micro", "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "precious"


def test_tokens_counted():
    assert cases.Case("train", "mambacus", "130m", "float32", 2, 256).tokens == 512
    assert cases.Case("decode", "mambacus", "130m", "float32", 16, 8, new_tokens=4).tokens == 64


@pytest.mark.parametrize("what", ["train", "decode"])
def test_both_sides_run(tmp_path, what):
    config = bench.Config(
        what, tmp_path / "r.json", model="micro", seqlen=8, prompt=4, new_tokens=2, repeats=1, warmup=0
    )
    bench.run(config)
    rows = read_record(tmp_path / "r.json").results["rows"]
    assert [row["implementation"] for row in rows] == ["mambacus", "transformers"] * (len(rows) // 2)
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] >= row["weights_memory_bytes"] > 0


def test_time_out_is_a_result():
    row = cases.measure(cases.Case("train", "mambacus", "micro", "float32", 1, 8), timeout_seconds=0.01)
    assert row["error"].startswith("not finished after")


def test_a_broken_case_is_an_error():
    with pytest.raises(UserError, match=r"train nosuch float32 1 x 8 mambacus: model 'random:nosuch': expected"):
        cases.measure(cases.Case("train", "mambacus", "nosuch", "float32", 1, 8), timeout_seconds=250)


def test_timing_drops_the_warm_up():
    import torch

    calls = []
    samples = timing.time_ms(lambda: calls.append(1), torch.device("cpu"), repeats=3, warmup=2)
    assert len(samples) == 3
    assert len(calls) == 5
