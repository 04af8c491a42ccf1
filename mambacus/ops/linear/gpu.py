"""Matrix products of training under autocast on a GPU: a weight's gradient leaves the product in the weight's float32.

Torch would write it in the dtype of autocast and convert it by a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambacus.ops.linear.dropout import draw_seed, drop

HALVES = (torch.bfloat16, torch.float16)


def autocast_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x @ weight.T`` (..., out_features) in ``dtype``, with gradients in the dtypes of ``x`` and ``weight``.

    Args:
        x: (..., in_features).
        weight: float32 (out_features, in_features); in ``dtype`` if it is not trained.
        dtype: of the products, bfloat16 or float16.

    Numerics:
        Sums in float32; the gradient of ``weight`` is not rounded to ``dtype``.

    Memory:
        For the backward pass ``x`` and ``weight`` in ``dtype`` if the weight is trained, else the weight as it is.
    """
    y: Tensor = _Linear.apply(x, weight, dtype)
    return y


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices in float32 whatever their dtype."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        inputs, matrix = x.to(dtype), weight.to(dtype)
        # A frozen weight is converted again when it is needed: kept, its copies would be half as large as the model
        kept = matrix if wants_weight else weight
        ctx.save_for_backward(inputs if wants_weight else None, kept if wants_x else None)
        ctx.x_dtype = x.dtype
        return F.linear(inputs, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = None if weight is None else (grad @ weight.to(grad.dtype)).to(ctx.x_dtype)
        if inputs is None:
            return grad_x, None, None
        return grad_x, float32_product(grad.flatten(0, -2).t(), inputs.flatten(0, -2)), None


def lora_linear(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, dropout: float, dtype: torch.dtype
) -> Tensor:
    """Return ``x @ weight.T + scale * (drop(x) @ down.T) @ up.T`` in ``dtype``, for a weight that is not trained.

    The adapter's product comes first and the large one is added to it while it is computed, forwards and backwards:
    the other way round, the small one would read and write the large result again.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features), frozen.
        down: float32 (rank, in_features).
        up: float32 (out_features, rank).
        scale: of the update.
        dropout: share of ``x`` that the adapter does not see.
        dtype: of the products, bfloat16 or float16.

    Numerics:
        Sums in float32; both products are rounded to ``dtype``, the gradients of ``down`` and ``up`` are not.

    Memory:
        For the backward pass what the adapter sees of ``x`` and its product with ``down``, in ``dtype``; no mask and no
        copy of the weight.
    """
    y: Tensor = _LoraLinear.apply(x, weight, down, up, scale, dropout, dtype)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, dropout: float, dtype: torch.dtype
    ) -> Tensor:
        rows, small, large = x.to(dtype).contiguous(), down.to(dtype), (up * scale).to(dtype)
        seed = draw_seed(x.device) if dropout > 0 else None
        seen = rows if seed is None else drop(rows, seed, dropout)
        low = seen @ small.t()  # (rows, rank)
        ctx.save_for_backward(seen, weight, small, large, low, seed)
        ctx.scale, ctx.dropout, ctx.x_dtype = scale, dropout, x.dtype
        return torch.mm(low, large.t()).addmm_(rows, weight.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, small, large, low, seed = ctx.saved_tensors
        (grad,) = grads
        grad_low = grad @ large
        grad_up = float32_product(grad.t(), low).mul_(ctx.scale)
        grad_down = float32_product(grad_low.t(), seen)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ small
            if seed is not None:
                drop(grad_x, seed, ctx.dropout, out=grad_x)
            grad_x = grad_x.addmm_(grad, weight.to(grad.dtype)).to(ctx.x_dtype)
        return grad_x, None, grad_down, grad_up, None, None, None
