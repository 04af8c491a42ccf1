"""One token through a whole Mamba-1: the function, the weights that it takes, and which kernels it runs on."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

from mambacus.ops.decode_step.reference import decode_step_ref
from mambacus.runtime.errors import UserError


class LayerWeights(NamedTuple):
    """The parameters of one block.

    Attributes:
        norm: (d_model,).
        in_proj: (2 d_inner, d_model): x, then z.
        conv_weight: taps, oldest first, (d_inner, d_conv).
        conv_bias: (d_inner,) or None.
        x_proj: (dt_rank + 2 d_state, d_inner): dt, B, C.
        dt_proj: (d_inner, dt_rank).
        dt_bias: (d_inner,), float32.
        A_log: (d_inner, d_state), float32.
        D: (d_inner,), float32.
        out_proj: (d_model, d_inner).
    """

    norm: Tensor
    in_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor


@dataclasses.dataclass(frozen=True)
class StepWeights:
    """The parameters of a model without biases on ``in_proj`` and ``out_proj``, with a float32 residual stream.

    Attributes:
        embedding: (vocabulary, d_model).
        layers: one for each block.
        norm_f: (d_model,).
        head: (vocabulary, d_model).
        eps: added to the mean squares in the norms.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm_f: Tensor
    head: Tensor
    eps: float


def decode_step(
    weights: StepWeights,
    tokens: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    counts: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Read one token in each row; the states change in place.

    For each block, with x the residual stream: ``x += out_proj(S(conv(in_proj(norm(x)))))``, S being one step of the
    selective scan, ``h = exp(delta A) h + delta B u``, ``y = (C h + D u) silu(z)``.

    Args:
        weights: the model.
        tokens: int64 (batch,).
        conv_state: the last ``d_conv`` inputs of every convolution, (n_layer, batch, d_inner, d_conv).
        ssm_state: state of every scan, float32, (n_layer, batch, d_inner, d_state).
        counts: tokens read so far, int64 (batch,); one is added to each.
        backend: ``cuda`` for the kernels, ``reference``, or ``auto``: the kernels where nothing is in their way.

    Returns:
        The logits, float32 (batch, vocabulary).

    Raises:
        UserError: ``backend`` is unknown, or the kernels cannot run; the message says why.

    Numerics:
        Products of bfloat16 with sums in float32; the residual stream, states, decays and steps in float32. Rounded to
        bfloat16 are what the products read, ``in_proj``'s output and the convolved x.

    Gradients:
        None.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752), figure 3 and equation 2.
    """
    if backend not in ("auto", "cuda", "reference"):
        raise UserError(f"decode_step: backend: expected auto, cuda or reference, got {backend!r}")
    reason = "the reference was asked for" if backend == "reference" else obstacle(weights, len(tokens))
    if reason is None:
        from mambacus.ops.decode_step import gpu

        return gpu.run(weights, tokens, conv_state, ssm_state, counts)
    if backend == "cuda":
        raise UserError(f"decode_step: backend 'cuda' cannot run: {reason}")
    logits, new_conv_state, new_ssm_state = decode_step_ref(weights, tokens, conv_state, ssm_state)
    conv_state.copy_(new_conv_state)
    ssm_state.copy_(new_ssm_state)
    counts.add_(1)
    return logits


def obstacle(weights: StepWeights, batch: int) -> str | None:
    """Return why the kernels cannot step ``batch`` rows of this model, or None if they can."""
    from mambacus.ops.decode_step import gpu

    return gpu.obstacle(weights, batch)
