"""The order and the shapes of what `mambacus bench` measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambacus import bench
from mambacus.bench_plan import fill, plan
from mambacus.measuring.cases import Case
from mambacus.runtime.errors import UserError


def planned(what: str, **settings: object) -> list[Case]:
    return list(plan(fill(bench.Config(what, Path("r.json"), **settings))))


def test_implementations_alternate_within_a_shape():
    cases = planned("decode", batches=(1, 16), dtypes=("float32", "bfloat16"), peer_dtypes=("float32",))
    order = [(c.benchmark, c.dtype, c.batch, c.implementation) for c in cases]
    assert order[:4] == [
        ("prefill", "float32", 1, "mambacus"),
        ("prefill", "float32", 1, "transformers"),
        ("prefill", "float32", 16, "mambacus"),
        ("prefill", "float32", 16, "transformers"),
    ]
    assert ("decode", "bfloat16", 1, "transformers") not in order
    assert len(cases) == 3 * 2 * 3


def test_lists_are_crossed_and_a_prefill_is_measured_once():
    cases = planned("decode", implementations=("mambacus",), prompts=(16, 512), new_tokens=(8, 64), samples=64)
    shapes = {kind: [(c.seqlen, c.new_tokens) for c in cases if c.benchmark == kind] for kind in ("prefill", "samples")}
    assert shapes["prefill"] == [(16, 0), (512, 0)]
    assert shapes["samples"] == [(16, 8), (16, 64), (512, 8), (512, 64)]
    assert {c.samples for c in cases if c.benchmark == "samples"} == {64}


def test_a_slow_peer_gets_one_run_without_warm_up():
    ours, theirs = planned("train", peer_repeats=1)
    assert (ours.repeats, ours.warmup) == (3, 1)
    assert (theirs.repeats, theirs.warmup) == (1, 0)


@pytest.mark.parametrize(("model", "peer"), [(None, "pythia-160m"), ("2.8b", "pythia-2.8b")])
def test_lengths_sets_a_transformer_of_the_same_size_beside_ours(model, peer):
    cases = planned("lengths", model=model)
    assert {c.implementation for c in cases} == {"mambacus", peer}
    assert {c.seqlen for c in cases} == {128, 512, 2048, 4096}


def test_on_a_gpu_both_modes_are_measured_and_training_has_float32_weights():
    cases = planned("lengths", device="cuda")
    assert {c.model for c in cases} == {"1.4b"} and max(c.seqlen for c in cases) == 65536
    modes = {(c.implementation, c.graph) for c in cases}
    assert modes == {(name, graph) for name in ("mambacus", "pythia-1.4b") for graph in (False, True)}
    assert {(c.benchmark, c.dtype) for c in cases} == {
        ("prefill", "bfloat16"), ("decode", "bfloat16"), ("train", "mixed")
    }  # fmt: skip


def test_the_engine_has_one_mode_on_a_gpu():
    whole = [c for c in planned("decode", device="cuda") if c.benchmark == "generate"]
    assert [(c.implementation, c.graph) for c in whole] == [
        ("transformers", False), ("mambacus", True), ("transformers", True)
    ]  # fmt: skip


def test_graphs_need_a_gpu():
    with pytest.raises(UserError, match="--modes graph: expected with --device cuda, got cpu"):
        planned("decode", modes=("graph",))
