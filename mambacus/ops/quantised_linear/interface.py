"""A matrix product with quantised weights, and rows of such a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.dispatch import runs_eagerly_on_cpu
from mambacus.ops.linear import linear
from mambacus.ops.quantised_linear.packing import Packed, unpack
from mambacus.ops.quantised_linear.reference import quantised_linear_ref

FEW_ROWS = 64  # up to here the own kernel is faster than unpacked weights and torch's product
UNPACKED_WEIGHTS = 1 << 22  # weights unpacked at a time: 16 MiB
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def quantised_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ unpack(weight).T + bias``.

    On a CPU few rows (decoding) run an own kernel that reads each quantised weight once; for many rows (prompts) the
    weights are unpacked in pieces for torch's product. Elsewhere the reference computes.

    Args:
        x: (..., in_features), any float dtype, without gradient.
        weight: (out_features, in_features), from `pack`.
        bias: (out_features,).

    Returns:
        (..., out_features) in the dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, or a gradient is needed: there is none.

    Numerics:
        Few rows: inputs are rounded to whole multiples of their row's largest / 16383, which changes a row by less than
        rounding it to bfloat16 does; products and their sums in a group are exact integers, sums of groups float32.
        Rows of inputs all below 1e-30 count as zeros. Many rows: as `linear` with the unpacked weights, in the dtype of
        ``x``.

    Memory:
        At most 16 MiB for unpacked weights, or the few rows in 16 bits for each thread, besides a result in float32.
    """
    if x.shape[-1:] != (weight.length,):
        raise ValueError(f"x: expected shape (..., {weight.length}), got {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("quantised weights pass no gradient: train the model before it is quantised")
    if not runs_eagerly_on_cpu(x) or x.dtype not in _KERNEL_DTYPES or x.numel() == 0:
        return quantised_linear_ref(x, weight, bias)
    if x.numel() // weight.length > FEW_ROWS:
        return _many_rows(x, weight, bias)
    from mambacus.ops.quantised_linear.cpu import few_rows  # numba loads where it is needed

    if bias is None:
        return few_rows(x, weight, x.dtype)
    return few_rows(x, weight).add_(bias).to(x.dtype)


def quantised_rows(weight: Packed, rows: Tensor) -> Tensor:
    """Return rows of quantised weights as float32 (..., in_features), given their numbers, int64 or int32 (...).

    Raises:
        ValueError: the numbers are of another dtype.
        IndexError: there is no row of such a number.
    """
    if rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows: expected int64 or int32, got {rows.dtype}")
    if not runs_eagerly_on_cpu(rows):
        chosen = rows.flatten()
        codes, scales = F.embedding(chosen, weight.codes), F.embedding(chosen, weight.scales)
        part = Packed(weight.format, codes, scales, weight.length)
        return unpack(part).view(*rows.shape, weight.length)
    from mambacus.ops.quantised_linear.cpu import unpack_rows

    return unpack_rows(weight, rows.flatten()).view(*rows.shape, weight.length)


def _many_rows(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    from mambacus.ops.quantised_linear.cpu import unpack_rows

    outputs = len(weight.codes)
    step = max(1, UNPACKED_WEIGHTS // weight.length)
    pieces = []
    for first in range(0, outputs, step):
        part = unpack_rows(weight, torch.arange(first, min(first + step, outputs))).to(x.dtype)
        pieces.append(linear(x, part, None if bias is None else bias[first : first + step].to(x.dtype)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
