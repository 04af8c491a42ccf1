"""Root mean square normalisation on a CPU."""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mambacus.ops.rows import VIEW_FIELDS, new, plain_rows, read, read_view, view, write
from mambacus.ops.simd import LANES, load_float, round_bfloat16, splat, total
from mambacus.ops.threads import Kernel, thread_count

ROWS = 8  # rows of one task
NANOSECONDS = 0.3  # of one thread, for one number
_ABSENT = view(None)


@Kernel
def normalise(p, thread, threads):
    """Normalise the rows of this thread's tasks."""
    rows, width, eps = p[0], p[1], load_float(p[2])
    x, weight, y = read_view(p, 3), read_view(p, 3 + VIEW_FIELDS), read_view(p, 3 + 2 * VIEW_FIELDS)
    added, summed = read_view(p, 3 + 3 * VIEW_FIELDS), read_view(p, 3 + 4 * VIEW_FIELDS)
    for task in range(thread, -(-rows // ROWS), threads):
        for row in range(task * ROWS, min((task + 1) * ROWS, rows)):
            squares = splat(0.0)
            if added.address != 0:
                for i in range(0, width, LANES):
                    write(summed, row, 0, i, read(x, row, 0, i) + read(added, row, 0, i))
            source = x if added.address == 0 else summed
            for i in range(0, width, LANES):
                value = read(source, row, 0, i)
                squares = squares + value * value
            scale = np.float32(1.0) / np.sqrt(total(squares) / np.float32(width) + eps)
            for i in range(0, width, LANES):
                value = read(source, row, 0, i) * scale
                if weight.half:
                    value = round_bfloat16(value)
                write(y, row, 0, i, value * read(weight, 0, 0, i))


@functools.cache
def _in_memory(value: float) -> Tensor:
    """Return a float that a kernel can read by its address."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def forward(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the normalised rows of ``x``, or ``x + added``, and what was normalised; see `mambacus.ops.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    width = weight.shape[0]
    rows = x.numel() // width
    y = new(*x.shape, dtype=weight.dtype)
    summed, sources = x, (*plain_rows(y, width), *_ABSENT, *_ABSENT)
    if added is not None:
        added, summed = added.contiguous(), new(*x.shape, dtype=x.dtype)
        sources = (*plain_rows(y, width), *plain_rows(added, width), *plain_rows(summed, width))
    arguments = [rows, width, _in_memory(eps).data_ptr(), *plain_rows(x, width), *view(weight), *sources]
    normalise(arguments, thread_count(-(-rows // ROWS), NANOSECONDS * rows * width))
    return y, summed
