"""The selective scan on a CPU; for now by the reference and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacus.ops.selective_scan.reference import selective_scan_ref, selective_state_update_ref


def chunk_length(d_state: int) -> int:
    """Return the number of tokens between two saved states."""
    return 64


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel behind ``mambacus::selective_scan_forward``."""
    batch, seqlen, d_inner = x.shape
    n_chunks = -(-seqlen // chunk_length(A.shape[1])) if save_states else 0
    chunk_states = x.new_zeros(batch, n_chunks, d_inner, A.shape[1], dtype=torch.float32)
    y, final_state = selective_scan_ref(
        x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, seq_idx=seq_idx,
        initial_state=initial_state,
    )  # fmt: skip
    return y, final_state.clone(), chunk_states


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_states: Tensor,
) -> tuple[Tensor, ...]:
    """Run the kernel behind ``mambacus::selective_scan_backward``."""
    given = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    x, delta, A, B, C, D, z, delta_bias, initial_state = leaves
    with torch.enable_grad():
        y, final_state = selective_scan_ref(
            x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, seq_idx=seq_idx,
            initial_state=initial_state,
        )  # fmt: skip
    if grad_final_state is None:
        grad_final_state = torch.zeros_like(final_state)
    grads = iter(
        torch.autograd.grad([y, final_state], [t for t in leaves if t is not None], [grad_y, grad_final_state])
    )
    return tuple(torch.empty(0) if t is None else next(grads) for t in leaves)


def update(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Run the kernel behind ``mambacus::selective_state_update``."""
    return selective_state_update_ref(
        state, x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
