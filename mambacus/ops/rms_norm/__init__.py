"""Root mean square normalisation."""

from mambacus.ops.rms_norm.interface import rms_norm

__all__ = ["rms_norm"]
