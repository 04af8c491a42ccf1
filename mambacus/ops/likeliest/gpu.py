"""The likeliest token on NVIDIA GPUs by the CUDA C++ kernel of ``likeliest.cu``, which NVRTC compiles at run time."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import Launch, Layout, Program

_THREADS = 1024
_GROUP = 4  # logits moved at once
_SOURCE = Path(__file__).with_name("likeliest.cu")
_Args = nvrtc.struct("logits columns", "", "")


@functools.lru_cache(maxsize=256)
def _launch(logits: Layout, device: int) -> Launch:
    rows, columns = logits.shape
    macros = nvrtc.macros(COLUMNS=columns, VEC=nvrtc.group_size(_GROUP, logits), THREADS=_THREADS)
    return Launch.of(
        Program(nvrtc.source(_SOURCE), macros, device), "likeliest", (rows, 1, 1), _THREADS, _Args, {}
    )  # fmt: skip


def likeliest(logits: Tensor) -> Tensor:
    """Return what `mambacus.ops.likeliest.likeliest` does, of contiguous float32 (rows, columns)."""
    columns = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits) > 0:
        launch = _launch(nvrtc.layout(logits), logits.device.index)
        with nvrtc.on_device(logits.device):
            launch(logits=logits, columns=columns)
    return columns
