"""Root mean square normalisation in one pass on a CPU, where torch makes six."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.dispatch import runs_eagerly_on_cpu

_VECTOR = 16  # the kernel reads whole vectors of at most so many numbers
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    When no gradient is needed an own kernel runs on a CPU; else torch computes.

    Args:
        x: (..., width).
        weight: (width,).
        eps: added to the mean square.

    Returns:
        (..., width) in the dtype of ``weight``.

    Numerics:
        The mean and the quotient in float32, or float64 if ``x`` is; the quotient is rounded to the dtype of ``weight``
        before the product with it.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = x.shape[-1:] == weight.shape and weight.shape[0] % _VECTOR == 0 and x.numel() > 0
    known = x.dtype in _KERNEL_DTYPES and weight.dtype in _KERNEL_DTYPES
    if fits and known and not needs_grad and runs_eagerly_on_cpu(x):
        from mambacus.ops.rms_norm.cpu import forward  # numba loads where it is needed

        return forward(x, weight, eps)
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight.shape, eps=eps)
    return normed.to(weight.dtype) * weight
