"""One token through a whole Mamba-1."""

from mambacus.ops.decode_step.interface import LayerWeights, StepWeights, decode_step, obstacle

__all__ = ["LayerWeights", "StepWeights", "decode_step", "obstacle"]
