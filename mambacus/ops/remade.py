"""A tensor that is not kept for the backward pass but made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def remade(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which ops that want to keep ``tensor`` keep ``make`` instead.

    Args:
        tensor: an input of the ops in the context.
        make: gives the same numbers again; called without gradients each time the backward pass asks for them.
    """
    wanted = _identity(tensor)  # not the tensor: torch keeps this function as long as what it returns

    def keep(kept: Tensor) -> Any:
        return make if _identity(kept) == wanted else kept

    def give(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            made: Tensor = kept()
        return made

    return torch.autograd.graph.saved_tensors_hooks(keep, give)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
