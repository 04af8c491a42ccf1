"""The causal convolution on a CPU; for now by the reference and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_forward``."""
    y, state = causal_conv1d_ref(
        x, weight, bias, activation="silu" if silu else None, seq_idx=seq_idx, initial_state=initial_state
    )
    return y, state.clone()


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run the kernel behind ``mambacus::causal_conv1d_backward``."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_state)]
    with torch.enable_grad():
        y, state = causal_conv1d_ref(
            leaves[0],
            leaves[1],
            leaves[2],
            activation="silu" if silu else None,
            seq_idx=seq_idx,
            initial_state=leaves[3],
        )
    if grad_final_state is None:
        grad_final_state = torch.zeros_like(state)
    grads = iter(torch.autograd.grad([y, state], [t for t in leaves if t is not None], [grad_y, grad_final_state]))
    return tuple(torch.empty(0) if t is None else next(grads) for t in leaves)


def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_update``."""
    return causal_conv1d_update_ref(x, conv_state, weight, bias, activation="silu" if silu else None)
