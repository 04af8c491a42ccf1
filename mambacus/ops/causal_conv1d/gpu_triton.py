"""The causal convolution on a GPU: buffers and launches of the kernels in ``gpu_triton_kernels.py``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from mambacus.ops.causal_conv1d import gpu_triton_kernels as kernels

_BLOCK = 128  # channels of a program
_TILE = 16  # tokens of a tile
_RUN = 256  # tokens of a backward program, which writes one partial sum of the gradients of weight and bias


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels next to each other, copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_forward``."""
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x = _channels_last(x)
    y = x.new_empty(batch, seqlen, d_inner)
    # Rows of padding alone have no last token that would write it
    if initial_state is not None:
        final = initial_state.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    else:
        final = x.new_zeros(batch, d_inner, width)
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    with _on(x.device):
        kernels.conv_forward[(triton.cdiv(seqlen, _TILE), triton.cdiv(d_inner, _BLOCK), batch)](
            x, weight.contiguous(), _contiguous(bias), seq, _contiguous(initial_state), y, final, seqlen, d_inner,
            *x.stride()[:2], HAS_BIAS=bias is not None, HAS_SEQ=seq is not None, HAS_STATE=initial_state is not None,
            SILU=silu, WIDTH=width, TILE=_TILE, BLOCK=_BLOCK,
        )  # fmt: skip
    return y, final


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels behind ``mambacus::causal_conv1d_backward``.

    Returns:
        Gradients of x, weight, bias, initial_state; an empty tensor for each that is None.
    """
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, grad_y = _channels_last(x), _channels_last(grad_y)
    seq = first_real = None
    if seq_idx is not None:
        seq = seq_idx.to(torch.int32).contiguous()
        real = seq >= 0
        first_real = torch.where(real.any(1), real.to(torch.int32).argmax(1), seqlen).to(torch.int32)
    n_runs = triton.cdiv(seqlen, _RUN)
    blocks = triton.cdiv(d_inner, _BLOCK)
    grad_x = x.new_empty(batch, seqlen, d_inner)
    grad_weight = x.new_zeros(batch, n_runs, width, d_inner, dtype=torch.float32)
    grad_bias = x.new_empty(batch, n_runs, d_inner, dtype=torch.float32)
    grad_state = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    weight_, bias_, state, final = (_contiguous(t) for t in (weight, bias, initial_state, grad_final_state))
    inputs = (grad_y, final, x, weight_, bias_, seq, state, first_real)
    strides = (*grad_y.stride()[:2], *x.stride()[:2])
    flags = {"HAS_FINAL": final is not None, "HAS_BIAS": bias is not None, "HAS_SEQ": seq is not None, "SILU": silu,
                 "WIDTH": width, "BLOCK": _BLOCK}  # fmt: skip
    with _on(x.device):
        kernels.conv_backward[(n_runs, blocks, batch)](
            *inputs, grad_x, grad_weight, grad_bias, seqlen, d_inner, _RUN, n_runs, *strides,
            HAS_STATE=initial_state is not None, TILE=_TILE, **flags,
        )  # fmt: skip
        if initial_state is not None:
            kernels.conv_backward_state[(blocks, batch)](
                *inputs, grad_state, seqlen, d_inner, *strides, TILE=triton.next_power_of_2(width), **flags
            )
    return (
        grad_x,
        grad_weight.sum((0, 1)).t().to(weight.dtype, memory_format=torch.contiguous_format),
        x.new_empty(0) if bias is None else grad_bias.sum((0, 1)).to(bias.dtype),
        grad_state,
    )


def update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_update``; the new state goes to ``out``, if given.

    A thread reads each tap before it writes it, so ``out`` may be ``conv_state``.
    """
    batch, d_inner = x.shape
    x = _channels_last(x)
    y = x.new_empty(batch, d_inner)
    new_state = out if out is not None and out.is_contiguous() else x.new_empty(conv_state.shape)
    with _on(x.device):
        kernels.conv_update[(triton.cdiv(d_inner, _BLOCK), batch)](
            x, conv_state, weight.contiguous(), _contiguous(bias), y, new_state, d_inner, x.stride(0),
            *conv_state.stride(), HAS_BIAS=bias is not None, SILU=silu, WIDTH=weight.shape[1], BLOCK=_BLOCK,
        )  # fmt: skip
    return y, new_state if out is None or out is new_state else out.copy_(new_state)
