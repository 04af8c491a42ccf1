"""Several processes training one model, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from typing import Any

import torch

from mambacus.runtime.errors import UserError


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def is_sharded() -> bool:
    """Return whether the processes share the model out among them (FSDP2) instead of each holding all of it (DDP)."""
    return "RANK" in os.environ and _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def join(device: str) -> None:
    """Meet the other processes, if there are any; each takes the GPU of its local rank, or the CPU.

    Raises:
        UserError: a way of launching that is not supported, or fewer GPUs than processes.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", "bf16"):
        raise UserError(
            f"launched with mixed precision {os.environ['ACCELERATE_MIXED_PRECISION']}, which is refused; "
            "launch without and give --dtype bfloat16 or float32"
        )
    if world_size() == 1 and not is_sharded():
        return
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    faults = _faults_of_launch(on_cpu)
    if faults:
        raise UserError(f"launched with what does not work here: {'; '.join(faults)}")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not on_cpu and local >= torch.cuda.device_count():
        raise UserError(f"finetune: {local + 1} or more processes on a machine with {torch.cuda.device_count()} GPU(s)")
    from accelerate import PartialState

    PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "nccl")


def _faults_of_launch(on_cpu: bool) -> list[str]:
    """Return what the launcher asks for that does not work here; it says it in environment variables."""
    faults = []
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        faults.append("DeepSpeed is not supported; launch with FSDP2 or with neither")
    if not is_sharded():
        return faults
    if os.environ.get("FSDP_VERSION", "1") != "2":
        faults.append("FSDP is supported in version 2 only; launch with --fsdp_version 2 (FSDP_VERSION=2)")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        faults.append("FSDP's offloading to the CPU is not supported; launch with --fsdp_offload_params false")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        faults.append("FSDP's activation checkpointing is not supported; give --checkpointing instead")
    if on_cpu and torch.cuda.is_available():  # fully_shard's default mesh takes the GPUs
        faults.append("FSDP on the CPU of a machine with GPUs: hide them with CUDA_VISIBLE_DEVICES=")
    return faults


def wait() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        torch.distributed.barrier()


def gather(value: object) -> list[Any]:
    """Return what each process gives, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found
