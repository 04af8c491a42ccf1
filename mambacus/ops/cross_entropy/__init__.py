"""Cross entropy of a linear output head without all logits at once."""

from mambacus.ops.cross_entropy.interface import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
