"""Cross entropy on NVIDIA GPUs by the CUDA C++ kernel of ``loss.cu``, which NVRTC compiles at run time."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Launch, Layout, Program

_THREADS = 512
_GROUP = 8  # logits moved at once
_SOURCE = Path(__file__).with_name("loss.cu")
_Args = nvrtc.struct("logits targets losses", "", "")


@functools.lru_cache(maxsize=256)
def _launch(logits: Layout, gradient: bool, device: int) -> Launch:
    rows, columns = logits.shape
    macros = nvrtc.macros(COLUMNS=columns, VEC=nvrtc.group_size(_GROUP, logits), THREADS=_THREADS,
                          LOGITS_TYPE=TYPES[logits.dtype], GRADIENT=gradient)  # fmt: skip
    program = Program(nvrtc.source(_SOURCE), macros, device)
    return Launch.of(program, "cross_entropy", (rows, 1, 1), _THREADS, _Args, {})


def cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Return each row's loss, float32 (rows,), 0 where the target is negative.

    Args:
        logits: (rows, columns), contiguous; overwritten with their gradients if ``gradient``.
        targets: int64 (rows,), contiguous; one that is no column makes its row's loss and gradients NaN.
        gradient: whether the gradients are wanted.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits) > 0:
        launch = _launch(nvrtc.layout(logits), gradient, logits.device.index)
        with nvrtc.on_device(logits.device):
            launch(logits=logits, targets=targets, losses=losses)
    return losses
