"""Cross entropy on NVIDIA GPUs by the CUDA C++ kernel of ``loss.cu``, which NVRTC compiles at run time."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Program

_THREADS = 512
_GROUP = 8  # logits moved at once
_SOURCE = Path(__file__).with_name("loss.cu")
_Args = nvrtc.struct("logits targets losses", "", "")


@functools.cache
def _source() -> str:
    return nvrtc.source(_SOURCE)


def cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Return each row's loss, float32 (rows,), 0 where the target is negative.

    Args:
        logits: (rows, columns), contiguous; overwritten with their gradients if ``gradient``.
        targets: int64 (rows,), contiguous.
        gradient: whether the gradients are wanted.
    """
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    macros = {"COLUMNS": columns, "VEC": nvrtc.group_size(_GROUP, logits), "THREADS": _THREADS,
              "LOGITS_TYPE": TYPES[logits.dtype], "GRADIENT": gradient}  # fmt: skip
    program = Program(_source(), tuple(f"{name}={int(value)}" for name, value in macros.items()), logits.device.index)
    arguments = _Args()
    nvrtc.fill(arguments, {"logits": logits, "targets": targets, "losses": losses})
    program.kernel("cross_entropy")((rows, 1, 1), _THREADS, arguments)
    return losses
