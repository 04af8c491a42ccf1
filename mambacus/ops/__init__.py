"""The operations of Mamba: one folder per op, each with a reference in plain torch and a kernel per device."""

from mambacus.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from mambacus.ops.linear import Linear, linear
from mambacus.ops.rms_norm import rms_norm
from mambacus.ops.selective_scan import selective_scan, selective_state_update

__all__ = [
    "Linear",
    "causal_conv1d",
    "causal_conv1d_update",
    "linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
]
