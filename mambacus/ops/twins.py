"""A tensor for two readers, whose gradients reach the op that made it apart: torch would add them in a kernel first."""

from __future__ import annotations

from torch import Tensor

from mambacus.ops.dispatch import runs_eagerly_on_gpu


def twins(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``tensor`` for two readers: itself twice, or with a second output of the op that made it, if it has one.

    An op that takes two gradients of one output gives it to the output as the attribute ``twin``, of the same memory.
    """
    return tensor, getattr(tensor, "twin", tensor) if runs_eagerly_on_gpu(tensor) else tensor
