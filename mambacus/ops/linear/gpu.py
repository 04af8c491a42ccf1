"""Matrix products of training under autocast on a GPU: a weight's gradient leaves the product in the weight's float32.

Torch would write it in the dtype of autocast and convert it by a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocast_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x @ weight.T`` (..., out_features) in ``dtype``, with gradients in the dtypes of ``x`` and ``weight``.

    Args:
        x: (..., in_features).
        weight: float32 (out_features, in_features).
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
