"""How quantised weights lie in memory.

A row of weights is cut into blocks of 32 words of 16 bits (one cache line), and a word holds two weights of 8 bits or
four of 4 bits: weight ``32 j + l`` of a block is the j-th number, from the lowest bits on, of word l. So the same bits
of all words are 32 neighbouring weights, which a kernel cuts out by a shift and multiplies with neighbouring inputs.

    weights   bits   block   group    scales     bytes a weight
    int8      8      64      64       bfloat16   1.031
    int4      4      128     32       bfloat16   0.5625

Weights are ``scale * q`` with q in [-127, 127] or [-8, 7]; each group of neighbours in a row has its own scale.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = 32  # of a block
BLOCK_BYTES = 2 * WORDS
SEARCHED_SCALES = 13  # scales tried for each group of int4, from 0.70 to 1.06 of that which fits the largest weight


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of quantised weights.

    Attributes:
        name: ``int8`` or ``int4``.
        bits: of a weight.
        group: neighbouring weights with one scale.
    """

    name: str
    bits: int
    group: int

    @property
    def planes(self) -> int:
        """Weights in a word."""
        return 16 // self.bits

    @property
    def block(self) -> int:
        """Weights in a block."""
        return self.planes * WORDS

    def padded(self, length: int) -> int:
        """Return ``length`` rounded up to whole blocks."""
        return -(-length // self.block) * self.block


FORMATS = {"int8": Format("int8", 8, 64), "int4": Format("int4", 4, 32)}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised matrix.

    Attributes:
        format: how it lies in memory.
        codes: the words, int16 (out_features, 32 * blocks), contiguous.
        scales: bfloat16 (out_features, groups), contiguous.
        length: in_features; the last block is filled with zeros.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: Tensor, name: str) -> Packed:
    """Quantise a matrix.

    The scale of an int8 group fits its largest weight; that of an int4 group is the best of several by squared error,
    around that which makes the largest weight -8.

    Args:
        weight: (out_features, in_features), any float dtype, finite.
        name: a key of `FORMATS`.
    """
    form = FORMATS[name]
    outputs, length = weight.shape
    padded = F.pad(weight.detach().float(), (0, form.padded(length) - length))
    groups = padded.view(outputs, -1, form.group)
    if form.bits == 8:
        scales = _upwards(groups.abs().amax(-1, keepdim=True) / 127)
        codes = _round(groups, scales, -127, 127)
    else:
        scales = _best_scales(groups)
        codes = _round(groups, scales, -8, 7)
    planes = codes.view(outputs, -1, form.planes, WORDS).to(torch.int32)
    mask = (1 << form.bits) - 1
    words = sum((planes[:, :, j] & mask) << (form.bits * j) for j in range(form.planes))
    assert isinstance(words, Tensor)
    return Packed(form, words.to(torch.int16).view(outputs, -1), scales.squeeze(-1).bfloat16(), length)


def unpack(packed: Packed) -> Tensor:
    """Return the weights as float32 (out_features, in_features)."""
    form = packed.format
    words = packed.codes.to(torch.int32).view(len(packed.codes), -1, 1, WORDS)
    up = torch.tensor(
        [32 - form.bits * (j + 1) for j in range(form.planes)], dtype=torch.int32, device=words.device
    ).view(-1, 1)
    codes = (words << up) >> (32 - form.bits)  # the sign comes along
    groups = codes.view(len(codes), -1, form.group) * packed.scales.float().unsqueeze(-1)
    return groups.flatten(1)[:, : packed.length]


def _round(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (groups * inverse).round().clamp(least, most)


def _upwards(scales: Tensor) -> Tensor:
    """Return ``scales`` rounded up to bfloat16, so that the largest weight still fits."""
    near = scales.bfloat16().float()
    return torch.where(near < scales, near * (1 + 2**-7), near).bfloat16().float()


def _best_scales(groups: Tensor) -> Tensor:
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for factor in torch.linspace(0.70, 1.06, SEARCHED_SCALES).tolist():
        scales = (largest * (factor / -8)).bfloat16().float()
        error = (_round(groups, scales, -8, 7) * scales - groups).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best
