"""Root mean square normalisation in one pass, where torch makes several."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.dispatch import runs_eagerly_on_cpu, runs_eagerly_on_gpu
from mambacus.ops.nvrtc import on_device

_VECTOR = 16  # the kernel reads whole vectors of at most so many numbers
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

torch.library.define(
    "mambacus::rms_norm_forward",
    "(Tensor x, Tensor? added, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mambacus::rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor scale, ScalarType? added_dtype)"
    " -> (Tensor, Tensor, Tensor)",
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Own kernels run on an NVIDIA GPU and, when no gradient is needed, on a CPU; else torch computes.

    Args:
        x: (..., width).
        weight: (width,).
        eps: added to the mean square.

    Returns:
        (..., width) in the dtype of ``weight``; under autocast on a GPU in the dtype of autocast.

    Numerics:
        The mean and the quotient in float32, or float64 if ``x`` is; the quotient is rounded to the dtype of ``weight``
        before the product with it.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """
    if _runs_on_gpu(x, weight):
        return _normalise(x, None, weight, eps)[0]
    if _runs_on_cpu(x, weight):
        from mambacus.ops.rms_norm.cpu import forward  # numba loads where it is needed

        return forward(x, weight, eps)[0]
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight.shape, eps=eps)
    return normed.to(weight.dtype) * weight


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(x + added, weight, eps)`` and ``x + added``, by the own kernels in one pass.

    Args:
        x: (..., width), the residual stream.
        added: (..., width), what a block adds to it.
        weight: (width,).
        eps: added to the mean square.

    Returns:
        The normalised sum as `rms_norm` returns it, and the sum.
    """
    same = x.shape == added.shape and torch.promote_types(x.dtype, added.dtype) == x.dtype
    if same and _runs_on_gpu(x, weight, added):
        return _normalise(x, added, weight, eps)
    if same and _runs_on_cpu(x, weight, added):
        from mambacus.ops.rms_norm.cpu import forward

        return forward(x, weight, eps, added)
    total = x + added
    return rms_norm(total, weight, eps), total


def _runs_on_gpu(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    if not x.is_cuda or x.shape[-1:] != weight.shape:
        return False
    from mambacus.ops.rms_norm.gpu import obstacle

    return obstacle(x, weight, *others) is None


def _runs_on_cpu(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    if not runs_eagerly_on_cpu(x) or x.shape[-1:] != weight.shape or weight.shape[0] % _VECTOR or x.numel() == 0:
        return False
    tensors = (x, weight, *others)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.dtype in _KERNEL_DTYPES for tensor in tensors)


def _normalise(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(weight)
    if runs_eagerly_on_gpu(x):
        from mambacus.ops.rms_norm.gpu import normalise

        return normalise(x, added, weight, eps, dtype)
    y, total, _ = torch.ops.mambacus.rms_norm_forward(x, added, weight, eps, dtype)
    return y, total


def _result_dtype(weight: Tensor) -> torch.dtype:
    if weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


@torch.library.impl("mambacus::rms_norm_forward", "CUDA")
def _forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from mambacus.ops.rms_norm import gpu

    with on_device(x.device):
        return gpu.forward(x, added, weight, eps, dtype)


@torch.library.impl("mambacus::rms_norm_backward", "CUDA")
def _backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mambacus.ops.rms_norm import gpu

    with on_device(grad_y.device):
        return gpu.backward(grad_y, *args)


@torch.library.register_fake("mambacus::rms_norm_forward")
def _forward_fake(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    scale = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(0 if added is None else x.shape), scale


@torch.library.register_fake("mambacus::rms_norm_backward")
def _backward_fake(
    grad_y: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    separate = added_dtype is not None and added_dtype != x.dtype
    grad_added = x.new_empty(x.shape if separate else 0, dtype=added_dtype or x.dtype)
    return x.new_empty(x.shape), grad_added, weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, added, weight, _, _ = inputs
    _, total, scale = output
    ctx.save_for_backward(x if added is None else total, weight, scale)
    ctx.added_dtype = None if added is None else added.dtype
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, weight, scale = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    sum_gradient = None if ctx.added_dtype is None else grad_sum
    grad_x, grad_added, grad_weight = torch.ops.mambacus.rms_norm_backward(
        grad_y, sum_gradient, x, weight, scale, ctx.added_dtype
    )
    if ctx.added_dtype is None:
        return grad_x, None, grad_weight, None, None
    return grad_x, grad_x if grad_added.numel() == 0 else grad_added, grad_weight, None, None


torch.library.register_autograd("mambacus::rms_norm_forward", _differentiate, setup_context=_save_for_backward)
