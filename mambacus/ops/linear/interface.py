"""A matrix product that is also fast on a CPU for few rows and for bfloat16."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambacus.ops.dispatch import runs_eagerly_on_cpu, runs_eagerly_on_gpu
from mambacus.ops.linear.gpu import HALVES, autocast_linear

FEW_ROWS = 64  # up to here the own kernel is faster than torch's product
_VECTOR = 16  # the kernel reads whole vectors of at most so many numbers
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
HEAD_TOKENS = 256  # of each row, for which a head's output is held in the dtype of the weights
CONVERTED_WEIGHTS = 1 << 22  # weights converted to float32 at a time: 16 MiB


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, as `torch.nn.functional.linear` does.

    When no gradient is needed, on a CPU, and all tensors are float32 or all bfloat16, few rows (decoding) run an own
    kernel that reads each weight once, and bfloat16 without hardware support converts the weights in pieces and
    multiplies in float32, which is several times faster than torch's emulation. On a GPU, a float32 weight under
    autocast gets its gradient in float32 from the product itself (`mambacus.ops.linear.gpu`). Else torch computes.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).

    Returns:
        (..., out_features) in the dtype of ``x``.

    Numerics:
        Sums in float32; bfloat16 results are rounded once.

    Memory:
        At most 16 MiB for converted weights, besides the result in float32.
    """
    if bias is None and _trains_on_gpu(x, weight):
        return autocast_linear(x, weight, torch.get_autocast_dtype("cuda"))
    if not _runs_here(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.numel() // weight.shape[1]
    if rows <= FEW_ROWS:
        from mambacus.ops.linear.cpu import few_rows  # numba loads where it is needed

        if bias is None:
            return few_rows(x, weight, x.dtype)
        return few_rows(x, weight).add_(bias).to(x.dtype)
    if x.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        return _multiply_in_float32(x, weight, bias)
    return F.linear(x, weight, bias)


def float32_output(layer: nn.Module, x: Tensor, width: int) -> Tensor:
    """Return ``layer(x)`` in float32 (float64 stays), which is what a head's logits are needed in.

    Without gradients, of a long sequence in a lower precision, a piece at a time: the output in that precision, half as
    much again as the result, is never held whole.

    Args:
        layer: a linear layer, or an adapter's wrapper of one.
        x: (..., in_features).
        width: the layer's out_features.

    Returns:
        (..., width).
    """
    if torch.is_grad_enabled() or x.dim() != 3 or x.shape[1] <= HEAD_TOKENS or x.dtype.itemsize >= 4:
        y: Tensor = layer(x)
        return y.to(torch.promote_types(y.dtype, torch.float32))
    y = x.new_empty(*x.shape[:-1], width, dtype=torch.float32)
    for piece, part in zip(x.split(HEAD_TOKENS, 1), y.split(HEAD_TOKENS, 1), strict=True):
        part.copy_(layer(piece))
    return y


class Linear(nn.Linear):
    """``nn.Linear`` whose forward is `linear`: the same parameters, names and training, faster decoding on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``; input (..., in_features)."""
        return linear(input, self.weight, self.bias)


def _trains_on_gpu(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a gradient is wanted of a product under autocast to half precision on a GPU.

    The weight is float32, or frozen and what autocast would make of it (`mambacus.tuning.frozen`).
    """
    if not (runs_eagerly_on_gpu(x) and runs_eagerly_on_gpu(weight) and torch.is_autocast_enabled("cuda")):
        return False
    if weight.dim() != 2 or x.dim() < 2 or x.dtype not in (torch.float32, *HALVES):
        return False
    dtype = torch.get_autocast_dtype("cuda")
    if weight.dtype != torch.float32 and (weight.dtype != dtype or weight.requires_grad):
        return False
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return wanted and dtype in HALVES


def _runs_here(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether the kernels may run: plain CPU tensors of one dtype, outside autograd, autocast and tracing."""
    if not runs_eagerly_on_cpu(x) or x.dtype not in _KERNEL_DTYPES or weight.dtype != x.dtype:
        return False
    if bias is not None and (bias.dtype != x.dtype or (bias.requires_grad and torch.is_grad_enabled())):
        return False
    if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
        return False
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or weight.shape[1] % _VECTOR or x.numel() == 0:
        return False
    return weight.is_contiguous() and not torch.is_autocast_enabled("cpu")


def _multiply_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``, converting the weights to float32 in pieces."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    x = x.to(torch.float32)
    rows = max(1, CONVERTED_WEIGHTS // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        piece = slice(first, first + rows)
        shift = None if bias is None else bias[piece].to(torch.float32)
        y[..., piece] = F.linear(x, weight[piece].to(torch.float32), shift)
    return y


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Tell whether this processor has bfloat16 products; without them torch's are slower than float32."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))
