"""The likeliest token of each row of logits."""

from mambacus.ops.likeliest.interface import likeliest

__all__ = ["likeliest"]
