"""Matrix products with quantised weights."""

from mambacus.ops.quantised_linear.interface import quantised_linear, quantised_rows
from mambacus.ops.quantised_linear.packing import FORMATS, Format, Packed, pack, unpack
from mambacus.ops.quantised_linear.reference import quantised_linear_ref

__all__ = [
    "FORMATS",
    "Format",
    "Packed",
    "pack",
    "quantised_linear",
    "quantised_linear_ref",
    "quantised_rows",
    "unpack",
]
