"""Two halves of a tensor whose gradients are written into one tensor, where torch would join them by a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacus.ops.dispatch import runs_eagerly_on_gpu


def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``tensor.chunk(2, dim=-1)`` for a last dimension of even size.

    On a GPU the ops that read a half may write its gradient where `gradient_place` says; if both do, the gradient of
    ``tensor`` is there without a copy.
    """
    if runs_eagerly_on_gpu(tensor) and torch.is_grad_enabled() and tensor.requires_grad:
        return _split(tensor)
    first, second = tensor.chunk(2, dim=-1)
    return first, second


class Place:
    """Where the gradient of one half shall be written."""

    def __init__(self, joined: list[Tensor], index: int) -> None:
        self._joined = joined  # the tensor of both gradients once it is there
        self._index = index

    def like(self, half: Tensor) -> Tensor:
        """Return memory for the gradient of ``half``."""
        width = half.shape[-1]
        if not self._joined:
            self._joined.append(half.new_empty(*half.shape[:-1], 2 * width))
        return self._joined[0].narrow(-1, self._index * width, width)


def gradient_place(tensor: Tensor | None) -> Place | None:
    """Return where an op shall write the gradient of ``tensor``, None for memory of its own."""
    return getattr(tensor, "gradient_place", None)


def _split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    joined: list[Tensor] = []
    found = _Halves.apply(tensor, joined)
    for index, half in enumerate(found):
        half.gradient_place = Place(joined, index)
    return found[0], found[1]


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, joined: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.joined = joined
        return tensor.chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joined = ctx.joined.pop() if ctx.joined else None
        if joined is not None and all(map(_same, joined.chunk(2, dim=-1), grads)):
            return joined, None
        return torch.cat(grads, dim=-1), None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
