"""Root mean square normalisation on NVIDIA GPUs by the CUDA C++ kernels of ``norm.cu``, which NVRTC compiles."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Launch, Layout, Program, layout

MAX_WIDTH = 8192
_GROUP = 4  # elements of a row moved at once
_WARPS = 8  # of a block
_WARP_ELEMENTS = 1024  # at most so many elements of a row for a warp
_FEW_ELEMENTS = 128  # and for few rows
_FEW_ROWS = (
    1056  # up to as many rows as an H100 runs blocks at once, all warps share a row: few would wait for each load
)
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


def _row_warps(width: int, elements: int = _WARP_ELEMENTS) -> int:
    """Return the warps that share a row, a power of two: each takes that many elements, if they are enough."""
    return min(_WARPS, 1 << max(0, (width - 1) // elements).bit_length())


class Case(NamedTuple):
    """What the code and the sizes of a launch depend on; all but the weight are contiguous rows."""

    rows: int
    x: Layout
    added: Layout | None
    weight: Layout
    y: Layout
    grad_sum: Layout | None
    eps: float
    device: int


@functools.lru_cache(maxsize=1024)
def _launch(case: Case, kernel: str) -> Launch:
    width = case.weight.shape[0]
    row_warps = _row_warps(
        width, _FEW_ELEMENTS if kernel == "norm_forward" and case.rows <= _FEW_ROWS else _WARP_ELEMENTS
    )
    block_rows = _WARPS // row_warps
    group = nvrtc.group_size(_GROUP, case.x, case.added, case.weight, case.y, case.grad_sum)
    macros = nvrtc.macros(
        WIDTH=width, VEC=group, WARPS=_WARPS, ROW_WARPS=row_warps, X_TYPE=TYPES[case.x.dtype],
        ADDED_TYPE=TYPES[(case.added or case.x).dtype], WEIGHT_TYPE=TYPES[case.weight.dtype],
        Y_TYPE=TYPES[case.y.dtype], HAS_ADDED=case.added is not None, HAS_GRAD_SUM=case.grad_sum is not None,
    )  # fmt: skip
    blocks = -(-case.rows // block_rows)
    if kernel == "norm_backward":
        blocks = min(blocks, _BACKWARD_BLOCKS)
    program = Program(nvrtc.source(_SOURCE), macros, case.device)
    return Launch.of(program, kernel, (blocks, 1, 1), 32 * _WARPS, _Args, {"rows": case.rows, "eps": case.eps})


def forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows in ``y_dtype``, ``x + added`` (empty without), and each row's scale."""
    x, weight = x.contiguous(), weight.contiguous()
    added = None if added is None else added.contiguous()
    rows = x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    total = x.new_empty(0 if added is None else x.shape)
    scale = x.new_empty(rows, dtype=torch.float32)
    case = Case(rows, layout(x), layout(added), layout(weight), layout(y), None, eps, x.device.index)
    _launch(case, "norm_forward")(x=x, added=added, weight=weight, sum=total, y=y, scale=scale)
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
    grad_x = torch.empty_like(x)
    separate = added_dtype is not None and added_dtype != x.dtype
    grad_added = torch.empty(x.shape if separate else 0, dtype=added_dtype or x.dtype, device=x.device)
    case = Case(
        x.numel() // x.shape[-1], layout(x), layout(grad_added) if separate else None, layout(weight),
        layout(grad_y), layout(grad_sum), 0.0, x.device.index,
    )  # fmt: skip
    launch = _launch(case, "norm_backward")
    part_rows = launch.grid[0] * (_WARPS // _row_warps(weight.shape[0]))
    part = x.new_empty(part_rows, weight.shape[0], dtype=torch.float32)
    launch(x=x, weight=weight, grad_y=grad_y, grad_sum=grad_sum, grad_x=grad_x, grad_added=grad_added, scale=scale,
           part=part)  # fmt: skip
    return grad_x, grad_added, part.sum(0).to(weight.dtype)


def normalise(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `forward`'s first two results, differentiable where needed: as the custom op, with less overhead."""
    with nvrtc.on_device(x.device):
        tensors = (x, weight) if added is None else (x, weight, added)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            y, total = _Norm.apply(x, added, weight, eps, y_dtype)
            return y, total
        return forward(x, added, weight, eps, y_dtype)[:2]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, y_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, total, scale = forward(x, added, weight, eps, y_dtype)
        ctx.save_for_backward(x if added is None else total, weight, scale)
        ctx.added_dtype, ctx.y_dtype = None if added is None else added.dtype, y_dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros(x.shape, dtype=ctx.y_dtype, device=x.device)
        with nvrtc.on_device(x.device):
            grad_x, grad_added, grad_weight = backward(
                grad_y, None if ctx.added_dtype is None else grad_sum, x, weight, scale, ctx.added_dtype
            )
        if ctx.added_dtype is None:
            return grad_x, None, grad_weight, None, None
        return grad_x, grad_x if grad_added.numel() == 0 else grad_added, grad_weight, None, None
