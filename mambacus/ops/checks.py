"""Checks of an op's arguments; every message names the argument, what was expected and what was got."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` is None or has the shape ``expected``."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def check_device(x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is on the device of ``x``: kernels read addresses, wherever they lead."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x, got {tensor.device}")


def check_tokens(name: str, seq_idx: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless ``seq_idx`` is None or holds one integer for each token of ``x``."""
    check_shape(name, seq_idx, tuple(x.shape[:2]))
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.is_complex()):
        raise ValueError(f"{name}: expected integers, got {seq_idx.dtype}")
