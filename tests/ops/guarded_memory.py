"""Tensors that end where memory ends: a kernel on the CPU that reads past one ends the process, as a GPU might."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from typing import Any

import torch
from torch import Tensor

_NO_ACCESS = 0  # PROT_NONE


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides, with a page behind its last element that nobody may read."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    whole = -(-span * tensor.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)  # lives as long as the tensor
    offset = whole - span * tensor.itemsize
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=offset)
    page = ctypes.c_void_p(flat.data_ptr() - offset + whole)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS) == 0, ctypes.get_errno()
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def guard(inputs: Any) -> Any:
    """Return a dict, tuple or dataclass of tensors, nested or not, with each of them `guarded`; the rest as it is."""
    if isinstance(inputs, Tensor):
        return guarded(inputs)
    if isinstance(inputs, dict):
        return {name: guard(value) for name, value in inputs.items()}
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        names = [field.name for field in dataclasses.fields(inputs)]
        return dataclasses.replace(inputs, **{name: guard(getattr(inputs, name)) for name in names})
    if isinstance(inputs, tuple):
        values = [guard(value) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else tuple(values)
    return inputs
