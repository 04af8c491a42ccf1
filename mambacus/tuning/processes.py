"""Several processes training one model, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os

import torch

from mambacus.runtime.errors import UserError


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str) -> None:
    """Meet the other processes, if there are any; each takes the GPU of its local rank, or the CPU.

    Raises:
        UserError: a way of sharing the model out that is not supported, or fewer GPUs than processes.
    """
    if world_size() == 1:
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true") or os.environ.get(
        "ACCELERATE_USE_DEEPSPEED", "false"
    ).lower() in ("1", "true"):
        raise UserError("finetune: sharded models (FSDP, DeepSpeed) are not supported; launch without, for plain DDP")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not on_cpu and local >= torch.cuda.device_count():
        raise UserError(f"finetune: {local + 1} or more processes on a machine with {torch.cuda.device_count()} GPU(s)")
    from accelerate import PartialState

    PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "nccl")


def wait() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        torch.distributed.barrier()
