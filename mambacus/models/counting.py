"""What a Mamba costs: parameters and floating-point operations by part, from its configuration alone."""

from __future__ import annotations

import torch

from mambacus.models.config import MambaConfig
from mambacus.models.mamba import MambaLM, keeps_float32


def count_parameters(config: MambaConfig) -> tuple[dict[str, int], int]:
    """Return the parameters of each part, and how many of them are float32 in every dtype. A tied head counts once."""
    with torch.device("meta"):
        named = dict(MambaLM(config).named_parameters())
    parts = dict.fromkeys(
        ("embeddings", "in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj", "norm", "lm_head"), 0
    )
    for name, parameter in named.items():
        steps = name.removesuffix(".weight").removesuffix(".bias").split(".")
        parts["norm" if steps[-1] == "norm_f" else steps[-1]] += parameter.numel()
    return parts, sum(parameter.numel() for name, parameter in named.items() if keeps_float32(name))


def count_flops(config: MambaConfig) -> dict[str, int]:
    """Return the floating-point operations of one forward token, by part.

    A product-sum counts 2. One state of the scan counts 7: ``delta A``, its exp, ``B`` times ``delta x``, decay, drive,
    and ``C h`` with its sum. Norms and activations are left out. A training step costs about three times as much.
    """
    d_model, d_inner, n_layer = config.d_model, config.d_inner, config.n_layer
    layer = {
        "in_proj": 2 * d_model * 2 * d_inner,
        "conv1d": 2 * d_inner * config.d_conv,
        "x_proj": 2 * d_inner * (config.dt_rank + 2 * config.d_state),
        "dt_proj": 2 * config.dt_rank * d_inner,
        "scan": 7 * d_inner * config.d_state,
        "out_proj": 2 * d_inner * d_model,
    }
    flops = {part: count * n_layer for part, count in layer.items()}
    flops["lm_head"] = 2 * d_model * config.padded_vocab_size
    return {**flops, "total": sum(flops.values())}
