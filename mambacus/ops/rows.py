"""How a CPU kernel sees tensors of tokens: an address, strides, a dtype, and the document of each token."""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mambacus.ops.simd import (
    LANES,
    VECTOR,
    load,
    load_bfloat16,
    load_float,
    load_int,
    splat,
    store,
    store_bfloat16,
    store_bfloat16_float,
    store_float,
)
from mambacus.ops.threads import Kernel


class View(NamedTuple):
    """Where a kernel finds element (b, t, 0) of a tensor: ``address + b * batch + t * row``, all in bytes.

    An absent tensor has the address 0.
    """

    address: int
    batch: int
    row: int
    half: int  # 1 for bfloat16, 0 for float32


VIEW_FIELDS = 4
COPIED_BY_KERNEL = 1 << 16  # most numbers of such a copy
_ABSENT = (0, 0, 0, 0)


def view(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Return the arguments from which `read_view` makes a `View`; the last dimension must be contiguous.

    A tensor of two dimensions is (batch, channels), one of a single dimension has the same channels in every row.
    """
    if tensor is None:
        return _ABSENT
    half = tensor.dtype == torch.bfloat16
    size = 2 if half else 4
    strides = tensor.stride()
    batch = strides[0] * size if len(strides) > 1 else 0
    row = strides[1] * size if len(strides) > 2 else 0
    return tensor.data_ptr(), batch, row, int(half)


def plain_rows(tensor: Tensor, width: int) -> tuple[int, int, int, int]:
    """Return the arguments for `read_view` of a contiguous tensor taken as (rows, width), whatever its shape."""
    half = tensor.dtype == torch.bfloat16
    return tensor.data_ptr(), width * (2 if half else 4), 0, int(half)


@njit
def read_view(p, first):
    """Return the `View` whose fields are the arguments from ``first`` on."""
    return View(p[first], p[first + 1], p[first + 2], p[first + 3])


@njit
def read(source, b, t, channel):
    """Return the vector at (b, t, channel) as float32."""
    address = source.address + b * source.batch + t * source.row
    if source.half:
        return load_bfloat16(address + 2 * channel)
    return load(address + 4 * channel)


@njit
def write(target, b, t, channel, value):
    """Write a vector to (b, t, channel) in the dtype of the view."""
    address = target.address + b * target.batch + t * target.row
    if target.half:
        store_bfloat16(address + 2 * channel, value)
    else:
        store(address + 4 * channel, value)


@njit
def read_numbers(address, first, half):
    """Return the vector from number ``first`` on of bfloat16 (``half``) or float32 at an address, as float32."""
    if half:
        return load_bfloat16(address + 2 * first)
    return load(address + 4 * first)


@njit
def write_number(address, index, value, half):
    """Write one float to place ``index`` of bfloat16 (``half``) or float32 numbers at an address."""
    if half:
        store_bfloat16_float(address + 2 * index, value)
    else:
        store_float(address + 4 * index, value)


@njit
def is_padding(seq_idx, token):
    """Tell whether the token has a negative document id; ``seq_idx`` is an address, 0 for a single document."""
    return seq_idx != 0 and load_int(seq_idx + 4 * token) < 0


@njit
def restarts(seq_idx, token, t):
    """Tell whether a real token begins another document than the real token before it in its row."""
    if seq_idx == 0 or t == 0:
        return False
    before, now = load_int(seq_idx + 4 * (token - 1)), load_int(seq_idx + 4 * token)
    return before >= 0 and now >= 0 and before != now


@njit
def gather(target, source, d_state, factor):
    """Turn (LANES, d_state) floats into d_state vectors times ``factor``; a source of 0 gives zeros."""
    for n in range(d_state):
        for lane in range(LANES):
            value = np.float32(0.0) if source == 0 else load_float(source + 4 * (lane * d_state + n)) * factor
            store_float(target + 4 * (n * LANES + lane), value)


@njit
def scatter(target, source, d_state):
    """Turn d_state vectors into (LANES, d_state) floats."""
    for n in range(d_state):
        for lane in range(LANES):
            store_float(target + 4 * (lane * d_state + n), load_float(source + 4 * (n * LANES + lane)))


@njit
def clear(target, count):
    """Fill ``count`` vectors with zeros."""
    for i in range(count):
        store(target + i * VECTOR, splat(0.0))


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory with any content on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def readable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as kernels read it: float32 or bfloat16, last dimension contiguous, made of whole vectors."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    missing = -tensor.shape[-1] % LANES
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@Kernel
def convert_kernel(p, thread, threads):
    """Copy numbers from one dtype to another; one thread does it."""
    count, source, source_half, target, target_half = p[0], p[1], p[2], p[3], p[4]
    for k in range(0, count, LANES):
        value = read_numbers(source, k, source_half)
        if target_half:
            store_bfloat16(target + 2 * k, value)
        else:
            store(target + 4 * k, value)


def copy(source: Tensor, target: Tensor) -> Tensor:
    """Copy ``source`` into ``target`` and return that; the few numbers of a token by a kernel, which tapes can join."""
    tensors = (source, target)
    known = all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in tensors)
    if not known or source.shape != target.shape or source.numel() > COPIED_BY_KERNEL or source.numel() % LANES:
        return target.copy_(source)
    halves = [int(t.dtype == torch.bfloat16) for t in tensors]
    convert_kernel((source.numel(), source.data_ptr(), halves[0], target.data_ptr(), halves[1]), 1)
    return target


def floats(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as contiguous float32."""
    return tensor if is_floats(tensor) else copy(tensor, new(*tensor.shape))


def is_floats(tensor: Tensor) -> bool:
    """Tell whether a kernel can write to ``tensor`` as it is: contiguous float32."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def address(tensor: Tensor | None) -> int:
    """Return where the tensor's memory begins, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def document_ids(seq_idx: Tensor | None) -> Tensor | None:
    """Return ``seq_idx`` as contiguous int32, which is what `is_padding` and `restarts` read."""
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def channel_rows(tensor: Tensor, d_inner: int) -> Tensor:
    """Return (..., channels, d_state) as contiguous float32 with zeros up to ``d_inner`` channels."""
    missing = d_inner - tensor.shape[-2]
    return floats(F.pad(tensor, (0, 0, 0, missing)) if missing else tensor)
