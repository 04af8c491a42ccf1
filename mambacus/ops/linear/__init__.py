"""Matrix products for a CPU."""

from mambacus.ops.linear.interface import Linear, float32_output, linear

__all__ = ["Linear", "float32_output", "linear"]
