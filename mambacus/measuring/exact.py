"""The selective scan and its gradients in float64 for whole tensors of any length, to hold a timed call to.

`mambacus.ops.selective_scan.reference` takes one token after the other, a minute for a million tokens; here blocks of
tokens run side by side, and what each leaves behind is carried on by the same recurrence over blocks. Channels are
taken a few at a time, so memory is bounded whatever the shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens of a block, which are taken one after the other
NUMBERS = {"cpu": 2**22, "cuda": 2**27}  # of states held at a time; about ten tensors of that size in float64
GRADIENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
SHARED = ("A", "B", "C", "D", "delta_bias")  # by rows of the batch or by channels: their gradients are sums


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Return h with h[t] = decay[t] h[t - 1] + drive[t] and nothing before the first; all are (seqlen, numbers)."""
    seqlen = len(decay)
    h = drive.clone()
    if seqlen <= BLOCK:
        for t in range(1, seqlen):
            h[t].addcmul_(decay[t], h[t - 1])
        return h
    rest = -seqlen % BLOCK
    shape = ((seqlen + rest) // BLOCK, BLOCK, -1)
    h = F.pad(h, (0, 0, 0, rest)).view(shape)
    product = F.pad(decay, (0, 0, 0, rest), value=1.0).view(shape).clone()
    for t in range(1, BLOCK):
        h[:, t].addcmul_(product[:, t], h[:, t - 1])
        product[:, t].mul_(product[:, t - 1])
    carried = linear_recurrence(product[:, -1].contiguous(), h[:, -1].contiguous())
    h[1:].addcmul_(product[1:], carried[:-1, None])
    return h.view(seqlen + rest, -1)[:seqlen]


class _Recurrence(torch.autograd.Function):
    """`linear_recurrence`, whose gradients are the same recurrence from the last token to the first."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor) -> Tensor:
        h = linear_recurrence(decay, drive)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        after = torch.cat((decay[1:], torch.zeros_like(decay[:1])))
        grad_drive = linear_recurrence(after.flip(0), grads[0].flip(0)).flip(0)
        grad_decay = grad_drive.clone()
        grad_decay[1:] *= h[:-1]
        grad_decay[0] = 0
        return grad_decay, grad_drive


def scan_of_channels(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y (seqlen, channels) and the final state (channels, d_state) of one row of a batch.

    x, delta and z are (seqlen, channels), A (channels, d_state), B and C (seqlen, d_state), D and delta_bias
    (channels,).
    """
    step = F.softplus(delta + delta_bias)
    decay = torch.exp(step[..., None] * A)
    drive = (step * x)[..., None] * B[:, None]
    states: Tensor = _Recurrence.apply(decay.flatten(1), drive.flatten(1)).view(decay.shape)
    y = torch.einsum("lcn,ln->lc", states, C) + D * x
    return y * F.silu(z), states[-1]


class _Distance:
    """Squared distances and squares of the exact numbers, summed up over parts of tensors."""

    def __init__(self) -> None:
        self.apart: dict[str, float] = defaultdict(float)
        self.whole: dict[str, float] = defaultdict(float)

    def add(self, name: str, got: Tensor, want: Tensor) -> None:
        self.apart[name] += (got.double() - want).square().sum().item()
        self.whole[name] += want.square().sum().item()

    def relative(self) -> dict[str, float]:
        return {name: self._share(apart, self.whole[name]) for name, apart in self.apart.items()}

    @staticmethod
    def _share(apart: float, whole: float) -> float:
        if not math.isfinite(apart):  # NaN, which a maximum of errors would pass over
            return math.inf
        return math.sqrt(apart / whole) if whole else math.inf if apart else 0.0  # of one token, A's gradient is zero


def scan_errors(
    inputs: Sequence[Tensor], grad_y: Tensor, outputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far every number of a scan's results lies from float64, as relative errors of whole tensors.

    Args:
        inputs: x, delta (batch, seqlen, d_inner), A (d_inner, d_state), B, C (batch, seqlen, d_state), D (d_inner,),
            z like x and delta_bias (d_inner,), of any dtype; softplus is applied to delta.
        grad_y: like x, what the gradients are of: the sum of grad_y times y.
        outputs: results to compare with y, or with the final state where the name has ``state`` in it.
        grads: gradients by the names of `GRADIENTS`, each like its input.

    Returns:
        The norm of the difference over the norm of the exact tensor, by name; infinity where a number is not finite, or
        where a tensor that should be zero is not.
    """
    x, _, A = inputs[:3]
    batch, seqlen, d_inner = x.shape
    count = max(1, NUMBERS[x.device.type] // (seqlen * A.shape[1]))
    found = _Distance()
    shared = {name: tensor for name, tensor in zip(GRADIENTS, inputs, strict=True) if name in SHARED}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in shared.items()}
    for row in range(batch):
        for first in range(0, d_inner, count):
            part = slice(first, first + count)
            places: dict[str, Any] = {name: (row, slice(None), part) for name in ("x", "delta", "z")}
            places |= dict.fromkeys(("A", "D", "delta_bias"), part) | dict.fromkeys(("B", "C"), row)
            leaves = [
                tensor[places[name]].double().requires_grad_() for name, tensor in zip(GRADIENTS, inputs, strict=True)
            ]
            y, state = scan_of_channels(*leaves)
            exact = torch.autograd.grad(y, leaves, grad_y[row, :, part].double())
            for name, got in outputs.items():
                if "state" in name:
                    found.add(name, got[row, part], state.detach())
                else:
                    found.add(name, got[row, :, part], y.detach())
            for name, want in zip(GRADIENTS, exact, strict=True):
                if name in sums:
                    sums[name][places[name]] += want
                else:
                    found.add(name, grads[name][places[name]], want)
    for name, want in sums.items():
        found.add(name, grads[name], want)
    return found.relative()
