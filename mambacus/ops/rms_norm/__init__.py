"""Root mean square normalisation."""

from mambacus.ops.rms_norm.interface import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
