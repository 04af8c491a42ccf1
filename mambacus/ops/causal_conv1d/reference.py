"""The causal depthwise convolution in plain torch: slow, short, and the truth that every kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Slide a window of ``d_conv`` inputs over the tokens; arguments and results as in `mambacus.ops.causal_conv1d`.

    Computes in float32, or in float64 if ``x`` is float64. Differentiable by autograd.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    batch, seqlen, d_inner = x.shape
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device) if seq_idx is None else seq_idx >= 0
    restart = torch.zeros_like(real)
    if seq_idx is not None:
        restart[:, 1:] = real[:, 1:] & real[:, :-1] & (seq_idx[:, 1:] != seq_idx[:, :-1])
    inputs = x.to(work).masked_fill(~real[..., None], 0)

    window = x.new_zeros(batch, d_inner, weight.shape[1], dtype=work)  # oldest first
    if initial_state is not None:
        window = initial_state.to(work)
    outputs = []
    for t in range(seqlen):
        window = window.masked_fill(restart[:, t, None, None], 0)
        moved = torch.cat([window[..., 1:], inputs[:, t, :, None]], dim=-1)
        window = torch.where(real[:, t, None, None], moved, window)
        outputs.append((window * weight.to(work)).sum(-1))  # (batch, d_inner)
    y = torch.stack(outputs, dim=1)  # (batch, seqlen, d_inner)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    return y.masked_fill(~real[..., None], 0).to(x.dtype), window.to(x.dtype)


def causal_conv1d_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """Run one token of the convolution; arguments and results as in `mambacus.ops.causal_conv1d_update`."""
    work = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([conv_state[..., 1:].to(x.dtype), x[..., None]], dim=-1)  # (batch, d_inner, d_conv)
    y = (window.to(work) * weight.to(work)).sum(-1)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), window
