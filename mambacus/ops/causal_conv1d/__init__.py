"""Causal depthwise convolution with a fused activation."""

from mambacus.ops.causal_conv1d.interface import causal_conv1d, causal_conv1d_update

__all__ = ["causal_conv1d", "causal_conv1d_update"]
