"""The order and the shapes of what `mambacus bench` measures."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from mambacus import bench
from mambacus.bench_plan import COUNTS, WHAT, fill, idle, plan
from mambacus.measuring.cases import Case
from mambacus.runtime.config import from_mapping
from mambacus.runtime.errors import UserError
from mambacus.studies.recipe import packaged_recipes, read_recipe


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


def test_as_many_dtypes_of_peers_are_measured_in_turn_with_ours():
    cases = planned("prefill", dtypes=("int8", "int4"), peer_dtypes=("float32", "bfloat16"), batches=(1, 4))
    assert [c.implementation for c in cases] == ["mambacus", "transformers"] * 4
    assert [(c.dtype, c.batch) for c in cases] == [
        ("int8", 1), ("float32", 1), ("int8", 4), ("float32", 4),
        ("int4", 1), ("bfloat16", 1), ("int4", 4), ("bfloat16", 4),
    ]  # fmt: skip


def test_the_same_case_is_measured_once():
    cases = planned("prefill", dtypes=("int8", "int4"), peer_dtypes=("float32", "float32"))
    assert [c.dtype for c in cases] == ["int8", "float32", "int4"]


CHANGED = {
    "model": "370m", "implementations": ("mambacus",), "batches": (4,), "seqlens": (8,), "prompts": (8,),
    "new_tokens": (8,), "samples": 4, "method": "lora", "logits": "all", "modes": ("eager",), "repeats": 1, "warmup": 0,
    "peer_repeats": 1, "peer_dtypes": ("float32",), "timeout": 9.0, "shapes": ("1x2x3",), "documents": 9,
    "peer_documents": 9, "resume": True,
}  # fmt: skip


@pytest.mark.parametrize("what", COUNTS)
def test_a_setting_that_does_not_count_is_refused(what):
    for name, value in CHANGED.items():
        faults = idle(bench.Config(what, Path("r.json"), **{name: value}))
        assert bool(faults) == (name not in COUNTS[what]), name
        assert all(fault.startswith(f"--{name.replace('_', '-')}: expected with ") for fault in faults)
    everywhere = {"dtypes": ("bfloat16",), "threads": 1, "label": "x", "overwrite": True, "data_dir": Path()}
    assert not idle(bench.Config(what, Path("r.json"), device="cuda", **everywhere))


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("train", {"seqlens", "method"}), ("decode", {"prompts", "new_tokens", "samples", "logits"}),
        ("prefill", {"seqlens", "logits"}), ("lengths", {"seqlens", "new_tokens", "method", "logits"}),
    ],
)  # fmt: skip
def test_what_counts_changes_the_cases_and_what_does_not_does_not(what, names):
    usual = planned(what)
    for name in ("seqlens", "prompts", "new_tokens", "samples", "method", "logits", "shapes", "documents"):
        assert (planned(what, **{name: CHANGED[name]}) != usual) == (name in names), name


def test_all_faults_are_named_at_once(tmp_path):
    message = (
        "--batches: expected with train, decode, prefill, lengths, not with eval; .*--dtypes: expected one for eval"
    )
    with pytest.raises(UserError, match=message):
        bench.run(bench.Config("eval", tmp_path / "r.json", batches=(4,), dtypes=("float32", "bfloat16")))


@pytest.mark.parametrize("what", ["scan", "eval"])
def test_dtypes_that_a_kind_does_not_take_are_named(what, tmp_path):
    with pytest.raises(UserError, match=f"--dtypes: expected of float32, bfloat16, float16 for {what}, got int8"):
        bench.run(bench.Config(what, tmp_path / "r.json", dtypes=("int8",)))


@pytest.mark.parametrize("name", packaged_recipes())
def test_recipes_set_what_counts(name):
    hints = typing.get_type_hints(bench.Config)
    for settings in read_recipe(name).bench:
        texts = from_mapping(settings | {"out": "r.json"}, hints, name)
        assert not idle(bench.Config(**texts))


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


def test_the_scan_is_timed_in_the_dtype_of_the_published_table_on_a_gpu():
    assert fill(bench.Config("scan", Path("r.json"), device="cuda")).dtypes == ("bfloat16",)
    assert fill(bench.Config("scan", Path("r.json"))).dtypes == ("float32",)


def test_the_engine_has_one_mode_on_a_gpu():
    whole = [c for c in planned("decode", device="cuda") if c.benchmark == "generate"]
    assert [(c.implementation, c.graph) for c in whole] == [
        ("transformers", False), ("mambacus", True), ("transformers", True)
    ]  # fmt: skip


def test_graphs_need_a_gpu():
    with pytest.raises(UserError, match="--modes graph: expected with --device cuda, got cpu"):
        planned("decode", modes=("graph",))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("what", list(WHAT))
def test_help_tells_every_default_of_every_kind(what, device):
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(bench.Config)}
    filled = fill(bench.Config(what=what, out=Path("b.json"), device=device))
    for name in ("model", "seqlens", "new_tokens", "dtypes", "modes"):
        if name not in COUNTS[what] | {"dtypes"}:
            continue
        value = getattr(filled, name)
        words = value if isinstance(value, str) else ",".join(map(str, value))
        told = fields[name][fields[name].rindex("(default: ") :].strip("()").split("; ")
        own = [part for part in told if f"{what} on {device}" in part]
        assert (own or told[:1])[0].endswith(f": {words}"), (name, fields[name])
