"""Cross entropy of a linear output head without all logits at once: they are the largest tensor of a training step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.linear.gpu import float32_product
from mambacus.ops.nvrtc import TYPES, unavailable

ROWS = 4096  # whose logits are held at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over rows of ``-log softmax(hidden @ weight.T)[target]``.

    On an NVIDIA GPU a kernel turns the logits of some rows at a time into losses and, where gradients are needed, into
    the gradients, from which those of ``hidden`` and ``weight`` follow at once; else torch computes all at once.

    Args:
        hidden: (rows, width).
        weight: (columns, width), of the output head.
        targets: int64 (rows,); rows with a negative target are not counted. One beyond the columns makes the loss NaN
            in the kernel, which cannot raise, and is an error of torch elsewhere.

    Returns:
        float32 ().

    Numerics:
        The products in the dtype of ``hidden``, or that of autocast; softmax and loss in float32 from the rounded
        logits; the gradient of the logits is rounded to their dtype, the gradient of ``weight`` summed in float32.

    Memory:
        The logits of `ROWS` rows; and for the backward pass the gradients of ``hidden`` and ``weight``.
    """
    if _runs_on_gpu(hidden, weight, targets):
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
        loss: Tensor = _Chunked.apply(hidden, weight, targets, dtype)
        return loss
    scores = F.linear(hidden, weight).float()
    return F.cross_entropy(scores, targets.clamp(min=-1), ignore_index=-1, reduction="sum")


def _runs_on_gpu(hidden: Tensor, weight: Tensor, targets: Tensor) -> bool:
    if not (hidden.is_cuda and weight.is_cuda and targets.is_cuda):
        return False
    return hidden.dtype in TYPES and weight.dtype in TYPES and unavailable() is None


class _Chunked(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        from mambacus.ops.cross_entropy.gpu import cross_entropy_

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows, matrix, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(rows) if wants_hidden else None
        grad_weight: Tensor | None = None
        for piece in (slice(first, first + ROWS) for first in range(0, len(rows), ROWS)):
            logits = rows[piece] @ matrix.t()
            loss += cross_entropy_(logits, targets[piece], gradient=wants_hidden or wants_weight).sum()
            if grad_hidden is not None:
                torch.mm(logits, matrix, out=grad_hidden[piece])
            if wants_weight:
                product = float32_product(logits.t(), rows[piece])
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        if wants_weight and grad_weight is None:  # there are no rows
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled = (None if t is None else (t * grad).to(d) for t, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None
