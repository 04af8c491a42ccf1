"""Two processes train as one does: the same samples a step, losses and weights; either resumes the other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record
from mambacus.tuning import processes
from mambacus.tuning.data import Sample
from mambacus.tuning.packing import PlannedBatches, plan

LENGTHS = [5, 9, 7, 3, 8, 6, 4, 10, 5, 7, 6]


def layout(count: int, **changes: Any) -> Any:
    settings = {"epochs": 2, "batch_size": 4, "grad_accum": 2, "capacity": 16, "seed": 3} | changes
    return plan(LENGTHS, processes=count, **settings)


@pytest.mark.parametrize("count", [2, 3])
def test_each_step_has_the_samples_it_has_with_one_process(count: int) -> None:
    one, several = layout(1), layout(count)
    assert several.steps == one.steps and several.tokens == one.tokens
    parts = len(several.micro_batches) // several.steps
    assert parts == 2 * count and len(several.micro_batches) % count == 0
    for step in range(one.steps):
        shared = [
            index
            for batch in several.micro_batches[step * parts : (step + 1) * parts]
            for row in batch
            for index in row
        ]
        alone = [index for batch in one.micro_batches[step * 2 : (step + 1) * 2] for row in batch for index in row]
        assert sorted(shared) == sorted(alone)


def test_a_process_without_samples_takes_part_with_nothing(samples: list[Sample]) -> None:
    layout = plan([*map(len, samples)], epochs=1, batch_size=7, grad_accum=1, capacity=64, seed=0, processes=4)
    batches = PlannedBatches(samples, layout)
    empty = [number for number, batch in enumerate(batches.plan.micro_batches) if not batch]
    assert empty  # the second step has one sample for four processes
    for number in empty:
        assert (batches[number]["labels"] == -100).all()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "version 2 only; launch with --fsdp_version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "give --checkpointing instead",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, which is refused"),
    ],
)
def test_what_does_not_work_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        processes.join("cpu")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_cpu_processes_beside_gpus_do_not_share_a_model_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        processes.join("cpu")


def launch(rows: Path, out: Path, count: int, *flags: str) -> None:
    """Run the command as ``torchrun`` does, on the CPU with gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = [
        "finetune", "--model", "random:micro", "--data", str(rows), "--out", str(out), "--batch-size", "4",
        "--max-steps", "5", "--save-every", "2", "--dropout", "0", "--device", "cpu", "--dtype", "float32",
        "--check", "0", "--lr", "0.01",
    ]  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "mambacus", *common, *flags],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)
    assert all("steps, loss" in said[0] and not text.strip().endswith("record.json") for text in said[1:])


def same(one: Path, other: Path) -> None:
    losses = [
        [entry["loss"] for entry in read_record(path / "record.json").results["history"]] for path in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one_and_resume_each_other(sums_file: Path, tmp_path: Path) -> None:
    launch(sums_file, tmp_path / "one", 1)
    launch(sums_file, tmp_path / "two", 2)
    same(tmp_path / "one", tmp_path / "two")
    assert read_record(tmp_path / "two" / "record.json").results["processes"] == 2
    cut = tmp_path / "two"  # as if killed after step 4: the other count goes on from there
    (cut / "record.json").unlink()

    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-5")
    launch(sums_file, cut, 1, "--resume")
    assert read_record(cut / "record.json").results["train"]["resumed_from_step"] == 4
    same(tmp_path / "one", cut)
