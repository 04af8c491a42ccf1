"""What the fused one-token step takes from a model, where the model is of the kind that it is made for."""

from __future__ import annotations

import os

import torch

from mambacus.models import MambaLM
from mambacus.models.mamba import CausalConv1d, Embedding, MambaMixer, RMSNorm, StepProjection
from mambacus.ops import Linear
from mambacus.ops.decode_step import LayerWeights, StepWeights, obstacle

_CLASSES = {
    "in_proj": Linear, "conv1d": CausalConv1d, "x_proj": Linear, "dt_proj": StepProjection, "out_proj": Linear,
}  # fmt: skip


def fused_weights(model: MambaLM, rows: int) -> StepWeights | str:
    """Return the weights of a model that `decode_step`'s kernels can step, or the reason why they cannot.

    The model is stepped past its modules' ``forward``: whoever calls this has seen that nobody else's code is in them.

    Args:
        model: the model.
        rows: of the batch.
    """
    if os.environ.get("MAMBACUS_GPU_KERNELS") == "triton":
        return "MAMBACUS_GPU_KERNELS=triton"
    if torch.is_autocast_enabled("cuda"):
        return "autocast chooses dtypes"
    weights = step_weights(model)
    return weights if isinstance(weights, str) else obstacle(weights, rows) or weights


def step_weights(model: MambaLM) -> StepWeights | str:
    """Return a model's weights as `decode_step` takes them, or why it is no model of that kind."""
    backbone = model.backbone
    if not model.config.residual_in_fp32:
        return "the residual stream is not float32"
    if type(backbone.embeddings) is not Embedding or type(model.lm_head) is not Linear:
        return "embedding or head are no plain layers"
    layers = []
    for block in backbone.layers:
        layer = _layer_weights(block.norm, block.mixer)
        if isinstance(layer, str):
            return layer
        layers.append(layer)
    norm_f = backbone.norm_f
    return StepWeights(backbone.embeddings.weight, tuple(layers), norm_f.weight, model.lm_head.weight, norm_f.eps)


def _layer_weights(norm: object, mixer: object) -> LayerWeights | str:
    if type(norm) is not RMSNorm or type(mixer) is not MambaMixer:
        return "a block's norm or mixer is another module"
    for name, cls in _CLASSES.items():
        if type(getattr(mixer, name)) is not cls:
            return f"{name} is a {type(getattr(mixer, name)).__name__}"
    if mixer.offset is not None:
        return "an adapter adds to the mixer's output"
    if mixer.in_proj.bias is not None or mixer.out_proj.bias is not None:
        return "in_proj and out_proj have biases"
    if "reference" in (mixer.backend, mixer.conv1d.backend):
        return "the reference was asked for"
    conv = mixer.conv1d
    return LayerWeights(
        norm.weight, mixer.in_proj.weight, conv.weight.squeeze(1), conv.bias, mixer.x_proj.weight,
        mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D, mixer.out_proj.weight,
    )  # fmt: skip
