"""Matrix products for a CPU."""

from mambacus.ops.linear.interface import Linear, linear

__all__ = ["Linear", "linear"]
