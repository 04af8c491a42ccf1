"""One token through a whole Mamba-1 in plain torch: what the kernels are held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.causal_conv1d.reference import causal_conv1d_update_ref
from mambacus.ops.selective_scan.reference import selective_state_update_ref

if TYPE_CHECKING:
    from mambacus.ops.decode_step.interface import StepWeights


def decode_step_ref(
    weights: StepWeights, tokens: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits and the new states; the arguments are those of `decode_step`, and nothing changes in place.

    Numerics:
        Each product in the dtype of its weights; norms, states and the residual stream at least in float32.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=weights.eps).to(weight.dtype) * weight

    embedded = weights.embedding[tokens]
    residual = embedded.to(torch.promote_types(embedded.dtype, torch.float32))  # (batch, d_model)
    conv_states, ssm_states = [], []
    for layer, conv, ssm in zip(weights.layers, conv_state, ssm_state, strict=True):
        rank, d_state = layer.dt_proj.shape[1], layer.A_log.shape[1]
        x, z = F.linear(norm(residual, layer.norm), layer.in_proj).chunk(2, dim=-1)  # (batch, d_inner) each
        x, conv = causal_conv1d_update_ref(x, conv, layer.conv_weight, layer.conv_bias)
        dt, B, C = F.linear(x, layer.x_proj).split([rank, d_state, d_state], dim=-1)
        delta = F.linear(dt, layer.dt_proj)  # (batch, d_inner)
        y, ssm = selective_state_update_ref(
            ssm, x, delta, -torch.exp(layer.A_log), B, C, layer.D, z, delta_bias=layer.dt_bias
        )
        residual = residual + F.linear(y, layer.out_proj)
        conv_states.append(conv)
        ssm_states.append(ssm)
    logits = F.linear(norm(residual, weights.norm_f), weights.head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, torch.stack(conv_states), torch.stack(ssm_states)
