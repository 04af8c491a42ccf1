"""The operations of Mamba: one folder per op, each with a reference in plain torch and a kernel per device."""

from mambacus.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from mambacus.ops.cross_entropy import linear_cross_entropy
from mambacus.ops.halves import halves
from mambacus.ops.likeliest import likeliest
from mambacus.ops.linear import Linear, float32_output, linear
from mambacus.ops.quantised_linear import quantised_linear, quantised_rows
from mambacus.ops.remade import remade
from mambacus.ops.rms_norm import add_rms_norm, rms_norm
from mambacus.ops.selective_scan import selective_scan, selective_state_update
from mambacus.ops.twins import twins

__all__ = [
    "Linear",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "float32_output",
    "halves",
    "likeliest",
    "linear",
    "linear_cross_entropy",
    "quantised_linear",
    "quantised_rows",
    "remade",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "twins",
]
