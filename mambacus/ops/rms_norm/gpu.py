"""Root mean square normalisation on NVIDIA GPUs by the CUDA C++ kernels of ``norm.cu``, which NVRTC compiles."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Program

MAX_WIDTH = 8192
_GROUP = 4  # elements of a row moved at once
_WARPS = 8  # of a block
_WARP_ELEMENTS = 1024  # at most so many elements of a row for a warp
_BACKWARD_BLOCKS = 264  # two for each of an H100's multiprocessors: a thread holds sums for all rows it walks through
_SOURCE = Path(__file__).with_name("norm.cu")
_Args = nvrtc.struct(
    "x added weight grad_y grad_sum sum y grad_x grad_added scale part", "rows", "", floats="eps"
)  # fmt: skip


def obstacle(x: Tensor, *others: Tensor) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    width = x.shape[-1]
    if any(not t.is_cuda or t.dtype not in TYPES for t in (x, *others)):
        return "they take CUDA tensors of float32, bfloat16 and float16"
    if width > MAX_WIDTH or x.numel() == 0:
        return f"they take rows of at most {MAX_WIDTH} elements, got {width}"
    return nvrtc.unavailable()


@functools.cache
def _source() -> str:
    return nvrtc.source(_SOURCE)


def _row_warps(width: int) -> int:
    """Return the warps that share a row: a power of two."""
    return 1 << max(0, (width - 1) // _WARP_ELEMENTS).bit_length()


def _program(
    x: Tensor, added: Tensor | None, weight: Tensor, y: Tensor, *others: Tensor | None, has_added: bool,
    has_grad_sum: bool,
) -> Program:  # fmt: skip
    macros = {
        "WIDTH": weight.shape[0], "VEC": nvrtc.group_size(_GROUP, x, added, weight, y, *others), "WARPS": _WARPS,
        "ROW_WARPS": _row_warps(weight.shape[0]),
        "X_TYPE": TYPES[x.dtype],
        "ADDED_TYPE": TYPES[x.dtype if added is None else added.dtype], "WEIGHT_TYPE": TYPES[weight.dtype],
        "Y_TYPE": TYPES[y.dtype], "HAS_ADDED": has_added, "HAS_GRAD_SUM": has_grad_sum,
    }  # fmt: skip
    return Program(_source(), tuple(f"{name}={int(value)}" for name, value in macros.items()), x.device.index)


def forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows in ``y_dtype``, ``x + added`` (empty without), and each row's scale."""
    x, weight = x.contiguous(), weight.contiguous()
    added = None if added is None else added.contiguous()
    rows, block_rows = x.numel() // x.shape[-1], _WARPS // _row_warps(x.shape[-1])
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    total = x.new_empty(0 if added is None else x.shape)
    scale = x.new_empty(rows, dtype=torch.float32)
    arguments = _Args()
    nvrtc.fill(arguments, {"x": x, "added": added, "weight": weight, "sum": total, "y": y, "scale": scale,
                           "rows": rows, "eps": eps})  # fmt: skip
    program = _program(x, added, weight, y, has_added=added is not None, has_grad_sum=False)
    program.kernel("norm_forward")((-(-rows // block_rows), 1, 1), 32 * _WARPS, arguments)
    return y, total, scale


def backward(
    grad_y: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of what was added to it (empty if in the same dtype or nothing was), and of weight.

    Args:
        grad_y: gradient of the normalised rows.
        grad_sum: gradient of ``x + added`` from elsewhere.
        x: what was normalised, ``x + added``.
        weight: (width,).
        scale: from `forward`.
        added_dtype: None if nothing was added.
    """
    x, grad_y, weight = x.contiguous(), grad_y.contiguous(), weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.to(x.dtype).contiguous()
    rows, block_rows = x.numel() // x.shape[-1], _WARPS // _row_warps(x.shape[-1])
    blocks = min(_BACKWARD_BLOCKS, -(-rows // block_rows))
    grad_x = torch.empty_like(x)
    separate = added_dtype is not None and added_dtype != x.dtype
    grad_added = torch.empty(x.shape if separate else 0, dtype=added_dtype or x.dtype, device=x.device)
    part = x.new_empty(blocks * block_rows, weight.shape[0], dtype=torch.float32)
    arguments = _Args()
    nvrtc.fill(arguments, {"x": x, "weight": weight, "grad_y": grad_y, "grad_sum": grad_sum, "grad_x": grad_x,
                           "grad_added": grad_added, "scale": scale, "part": part, "rows": rows})  # fmt: skip
    program = _program(
        x, grad_added if separate else None, weight, grad_y, grad_sum, has_added=separate,
        has_grad_sum=grad_sum is not None,
    )  # fmt: skip
    program.kernel("norm_backward")((blocks, 1, 1), 32 * _WARPS, arguments)
    return grad_x, grad_added, part.sum(0).to(weight.dtype)
