"""A model shared out over processes (FSDP2) trains as a whole one does: losses, weights, audit, checkpoints, files."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_runs import Job, errors, launch
from safetensors.torch import load_file

from mambacus.runtime.records import Record, read_record
from mambacus.tuning.methods import METHODS

SETTINGS: Job = {
    "model": "random:micro", "max_steps": 4, "batch_size": 4, "device": "cpu", "dtype": "float32", "save_every": 2,
    "check": 0, "lr": 0.01,
}  # fmt: skip
OPTIONS = {  # what PEFT's defaults are too large for in a model this small
    "fourierft": ["n_frequency=200"],
    "shira": ["r=4"],
    "c3a": ["block_size=8"],
    "road": ["group_size=16"],
    "waveft": ["n_frequency=200"],
    "miss": ["r=4"],
    "psoft": ["r=4"],
    "hira": ["r=8"],
    "oft": ["oft_block_size=4"],
    "boft": ["boft_block_size=4"],
    "vblora": ["num_vectors=32", "vector_length=32"],
    "adamss": ["num_subspaces=2", "r=8"],
    "unilora": ["theta_d_length=64"],
    "sdt": ["share=0.05"],
}
DROPS = ("lora", "lora+", "rslora", "dora", "pissa", "olora", "cs5242", "sdt")  # masks depend on the processes
EVERYWHERE = ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "embeddings", "lm_head"]
RUNS: dict[str, Job] = {
    **{
        name: {"method": name, "options": OPTIONS.get(name, []), "dropout": 0.0 if name in DROPS else None}
        for name in METHODS
    },
    "everywhere": {"method": "lora", "targets": EVERYWHERE, "dropout": 0.0},
    "dora on a tied matrix": {"method": "dora", "targets": ["embeddings", "lm_head"], "dropout": 0.0},
    "split": {"method": "full", "grad_accum": 2},
    "recomputed": {"method": "full", "checkpointing": True},
    "recomputed affix": {"method": "affix", "checkpointing": True},
    "one sample in the last step": {"method": "lora", "dropout": 0.0, "batch_size": 5, "epochs": 1, "max_steps": 0},
    "checked": {"method": "lora", "dropout": 0.0, "check": 2, "held_out": "wordproblems"},
    "checked full": {"method": "full", "check": 2, "held_out": "wordproblems"},
}


def job(out: Path, sums_file: Path, **changes: Any) -> Job:
    return SETTINGS | {"data": str(sums_file), "out": str(out)} | changes


@pytest.fixture(scope="module")
def alone(sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All `RUNS` by one process with the whole model."""
    folder = tmp_path_factory.mktemp("alone")
    launch(1, [job(folder / name, sums_file, **run) for name, run in RUNS.items()], sharded=False)
    return folder


@pytest.fixture(scope="module")
def shared(sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All `RUNS` by two processes that share the model out."""
    folder = tmp_path_factory.mktemp("shared")
    launch(2, [job(folder / name, sums_file, **run) for name, run in RUNS.items()], sharded=True)
    return folder


def tensors(run: Path) -> dict[str, torch.Tensor]:
    weights = "adapter/adapter_model.safetensors" if (run / "adapter").is_dir() else "model/model.safetensors"
    return load_file(run / weights)


def same(one: Path, other: Path) -> tuple[Record, Record]:
    """Compare two runs up to rounding; return their records."""
    records = read_record(one / "record.json"), read_record(other / "record.json")
    losses = [[entry["loss"] for entry in record.results["history"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.allclose(tensor, second[name], rtol=1e-3, atol=2e-5), name
    return records


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_share_the_model_out_train_as_one(alone: Path, shared: Path, name: str) -> None:
    one, two = same(alone / name, shared / name)
    assert (two.results["processes"], two.results["sharded"]) == (2, True)
    assert one.results["sharded"] is False
    assert one.results["parameters"] == two.results["parameters"]
    for what, found in one.results["check"].items():
        assert two.results["check"][what]["after"] == pytest.approx(found["after"], rel=1e-4), what


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_parts_may_be_unequal(alone: Path, sums_file: Path, tmp_path: Path) -> None:
    """Three processes: nothing in this model divides by three."""
    launch(3, [job(tmp_path / name, sums_file, **RUNS[name]) for name in ("lora", "full", "bitfit")], sharded=True)
    for name in ("lora", "full", "bitfit"):
        same(alone / name, tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_loss_that_leaps_on_one_process_stops_all(sums_file: Path, tmp_path: Path, sharded: bool) -> None:
    out = tmp_path / "spike"
    changes = {"method": "full", "max_steps": 24, "lr": 1e-5, "save_every": 13, "sabotage": "spike"}
    launch(2, [job(out, sums_file, **changes)], sharded=sharded)
    said = errors(out, 2)
    assert said[0] == said[1] and re.match(r"step 22: the loss is .* since step 15; .* is backbone", said[0]), said
    assert "checkpoint-13 is kept" in said[0]


def cut_short(run: Path, copy: Path) -> Path:
    """Copy a run as a kill after step 2 would have left it."""
    shutil.copytree(run, copy)
    for name in ("adapter", "model", "checkpoints/checkpoint-4"):
        shutil.rmtree(copy / name, ignore_errors=True)
    (copy / "record.json").unlink()
    return copy


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("first", "then", "sharded"), [("shared", 1, False), ("shared", 2, False), ("alone", 2, True), ("shared", 3, True)]
)
def test_a_run_goes_on_with_another_number_of_processes(
    alone: Path, shared: Path, sums_file: Path, tmp_path: Path, first: str, then: int, sharded: bool
) -> None:
    """From two that share the model out to one, to two that do not, to three; and from one to two."""
    names = ("lora", "full", "split", "init-state")
    start = {"shared": shared, "alone": alone}[first]
    cut = {name: cut_short(start / name, tmp_path / name) for name in names}
    launch(then, [job(cut[name], sums_file, resume=True, **RUNS[name]) for name in names], sharded=sharded)
    for name in names:
        _, record = same(alone / name, cut[name])
        assert record.results["train"]["resumed_from_step"] == 2


SABOTAGED = {
    "nan": (
        {"method": "lora", "dropout": 0.0, "sabotage": "nan"},
        r"step 3: the loss is nan, first seen in .*layers\.1\.mixer\.conv1d; .*checkpoint-2 is kept",
    ),
    "cut": (
        {"method": "full", "sabotage": "cut"},
        r"step 1: no gradient reaches .*layers\.1\.mixer\.dt_proj\.weight: it would never train",
    ),
    "forgotten": (
        {"method": "full", "sabotage": "forgotten"},
        r"step 2: two updates did not change .*\.mixer\.A_log.* and 8 more",
    ),
    "thawed": (
        {"method": "lora", "dropout": 0.0, "sabotage": "thawed"},
        r"training changed what is frozen: .*norm_f\.weight$",
    ),
    "full": (
        {"method": "full", "sabotage": "full"},
        r"cannot write the checkpoint of step 4: .*No space left on device; the last good one is .*checkpoint-2",
    ),
    "full elsewhere": (
        {"method": "lora", "dropout": 0.0, "sabotage": "full elsewhere"},
        r"cannot write the checkpoint of step 4: .*No space left on that device; the last good one is .*checkpoint-2",
    ),
}


WHOLE = ("cut", "forgotten", "full", "full elsewhere")  # of "nan" and "thawed" whole models tell their process alone


@pytest.fixture(scope="module")
def stopped(sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The runs of `SABOTAGED`, one after another in the same two processes: none may leave the others waiting."""

    @functools.cache
    def stop(sharded: bool) -> Path:
        folder = tmp_path_factory.mktemp("stopped")
        names = SABOTAGED if sharded else WHOLE
        launch(2, [job(folder / name, sums_file, **SABOTAGED[name][0]) for name in names], sharded=sharded)
        return folder

    return stop


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sharded", "name"), [*((True, name) for name in SABOTAGED), *((False, name) for name in WHOLE)]
)
def test_what_goes_wrong_on_one_process_stops_all_with_its_name(
    stopped: Callable[[bool], Path], sharded: bool, name: str
) -> None:
    run = stopped(sharded) / name
    said = errors(run, 2)
    assert said[0] == said[1]
    assert re.search(SABOTAGED[name][1], said[0]), said[0]
    assert not (run / "record.json").exists()
    if "full" in name:
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.mark.gpu
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    """``benchmarks/two_gpus.py``: DDP and FSDP2 over NCCL against one GPU, and resuming between them."""
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    root = Path(__file__).parents[2]
    script = [sys.executable, str(root / "benchmarks" / "two_gpus.py"), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
