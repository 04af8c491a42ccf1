"""`mambacus bench` measures both sides the same way and records failures as results."""

from __future__ import annotations

import pytest

from mambacus import bench
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
    with pytest.raises(UserError, match="expected mambacus, transformers, got 'vllm'"):
        list(bench.plan(bench.Config("train", tmp_path / "r.json", implementations=("vllm",))))


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
    with pytest.raises(UserError, match="train nosuch float32"):
        cases.measure(cases.Case("train", "mambacus", "nosuch", "float32", 1, 8), timeout_seconds=60)


def test_timing_drops_the_warm_up():
    import torch

    calls = []
    samples = timing.time_ms(lambda: calls.append(1), torch.device("cpu"), repeats=3, warmup=2)
    assert len(samples) == 3
    assert len(calls) == 5
