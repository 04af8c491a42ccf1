"""The selective scan in plain torch: slow, short, and the truth that every kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_ref(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time; arguments and results as in `mambacus.ops.selective_scan`.

    Computes in float32, or in float64 if ``x`` is float64. Differentiable by autograd.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    batch, seqlen, d_inner = x.shape
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device) if seq_idx is None else seq_idx >= 0
    restart = torch.zeros_like(real)
    if seq_idx is not None:
        restart[:, 1:] = real[:, 1:] & real[:, :-1] & (seq_idx[:, 1:] != seq_idx[:, :-1])
    padding = ~real[..., None]  # (batch, seqlen, 1)

    def prepare(tensor: Tensor) -> Tensor:
        return tensor.to(work).masked_fill(padding, 0)

    step = prepare(delta)  # (batch, seqlen, d_inner)
    if delta_bias is not None:
        step = step + delta_bias.to(work)
    if delta_softplus:
        step = F.softplus(step)
    step = step.masked_fill(padding, 0)  # a zero step passes the state through: exp(0) h + 0
    inputs, input_matrix, output_matrix = prepare(x), prepare(B), prepare(C)
    A = A.to(work)

    state = x.new_zeros(batch, d_inner, A.shape[1], dtype=work) if initial_state is None else initial_state.to(work)
    outputs = []
    for t in range(seqlen):
        state = state.masked_fill(restart[:, t, None, None], 0)
        decay = torch.exp(step[:, t, :, None] * A)  # (batch, d_inner, d_state)
        drive = (step[:, t] * inputs[:, t])[..., None] * input_matrix[:, t, None, :]
        state = decay * state + drive
        outputs.append(torch.einsum("bdn,bn->bd", state, output_matrix[:, t]))
    y = torch.stack(outputs, dim=1)  # (batch, seqlen, d_inner)
    if D is not None:
        y = y + D.to(work) * inputs
    if z is not None:
        y = y * F.silu(prepare(z))
    return y.to(x.dtype), state


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run one token of the recurrence; arguments and results as in `mambacus.ops.selective_state_update`."""
    work = torch.promote_types(x.dtype, torch.float32)
    step = delta.to(work)  # (batch, d_inner)
    if delta_bias is not None:
        step = step + delta_bias.to(work)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step[..., None] * A.to(work))  # (batch, d_inner, d_state)
    new_state = decay * state.to(work) + (step * x.to(work))[..., None] * B.to(work)[:, None, :]
    y = torch.einsum("bdn,bn->bd", new_state, C.to(work))
    if D is not None:
        y = y + D.to(work) * x.to(work)
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype), new_state
