"""Dropout from a seed: the same seed drops the same elements again, so no mask is kept between the passes."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Launch, Layout, Program

STEPS = 1 << 16  # the probability of keeping is a multiple of 1 / STEPS
_GROUP = 8
_THREADS = 256
_SOURCE = Path(__file__).with_name("dropout.cu")
_Args = nvrtc.struct("x y seed", "count", "keep", floats="scale")


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed, int64 (1,), from the device's generator; a CUDA graph draws a new one each time it runs."""
    return torch.randint(1 << 62, (1,), device=device)


def kept_share(p: float) -> int:
    """Return of how many of `STEPS` numbers an element is kept: at least of one."""
    return max(1, round((1 - p) * STEPS))


def drop(x: Tensor, seed: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """Return ``x`` with a share ``p`` of its elements zero and the others divided by the share that is kept.

    Args:
        x: float32, bfloat16 or float16, contiguous.
        seed: from `draw_seed`.
        p: share of the elements that are dropped.
        out: memory for the result, which may be ``x`` itself.

    Numerics:
        The share that is kept is rounded to 16 bits, and the elements are divided by that.
    """
    y = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return y
    if not x.is_cuda:
        return y.copy_(_drop_ref(x, seed, p))
    with nvrtc.on_device(x.device):
        _launch(nvrtc.layout(x), kept_share(p), x.device.index)(x=x, y=y, seed=seed)
    return y


@functools.lru_cache(maxsize=1024)
def _launch(x: Layout, keep: int, device: int) -> Launch:
    group = nvrtc.group_size(_GROUP, x)
    count = torch.Size(x.shape).numel() // group
    program = Program(nvrtc.source(_SOURCE), nvrtc.macros(VEC=group, X_TYPE=TYPES[x.dtype]), device)
    numbers = {"count": count, "keep": keep, "scale": STEPS / keep}
    return Launch.of(program, "dropout", (-(-count // _THREADS), 1, 1), _THREADS, _Args, numbers)


def _drop_ref(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return what `drop` does, in integers of torch: Philox4x32-7 of the numbers of groups of eight."""
    word = 0xFFFFFFFF
    key0, key1 = seed & word, seed >> 32 & word
    number = torch.arange(-(-x.numel() // _GROUP), device=x.device)
    c = [number & word, number >> 32, torch.zeros_like(number), torch.zeros_like(number)]
    for _ in range(7):
        (a_high, a_low), (b_high, b_low) = _product(0xD2511F53, c[0]), _product(0xCD9E8D57, c[2])
        c = [b_high ^ c[1] ^ key0, b_low, a_high ^ c[3] ^ key1, a_low]
        key0, key1 = key0 + 0x9E3779B9 & word, key1 + 0xBB67AE85 & word
    halves = torch.stack([half for one in c for half in (one & 0xFFFF, one >> 16)], dim=1)  # (groups, 8)
    keep = kept_share(p)
    kept = (halves < keep).flatten()[: x.numel()].view(x.shape)
    return torch.where(kept, x.float() * (STEPS / keep), 0.0).to(x.dtype)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of a product of 32-bit numbers held in int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + (high & 0xFFFF)  # of 2^16
    return (high >> 16) + (middle >> 16), (middle & 0xFFFF) << 16 | low & 0xFFFF
