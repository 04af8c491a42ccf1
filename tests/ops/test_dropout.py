"""Dropout from a seed, and LoRA's product that uses it: on a CPU the same numbers as on a GPU, in integers of torch."""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_as_good_as
from torch import Tensor

from mambacus.ops.linear import dropout, gpu
from mambacus.ops.linear.gpu import lora_linear


def seed(value: int) -> Tensor:
    return torch.tensor([value])


def test_the_bits_are_philoxs():
    """The authors' test vector of Philox4x32 with 7 rounds, counter and key zero."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for p in (0.1, 0.5, 0.9):
        kept = dropout.drop(torch.ones(8), seed(0), p) > 0
        assert kept.tolist() == [half < round((1 - p) * 65536) for half in halves]


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_shares_and_seeds(p):
    x = torch.ones(1 << 16)
    first, again, other = (dropout.drop(x, seed(n), p) for n in (3, 3, 4 << 40))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert first.mean().item() == pytest.approx(1, abs=0.01)
    apart = dropout.drop(torch.ones(2, 1 << 15), seed(3), p)
    assert torch.equal(apart.flatten(), first) and (apart[0] != apart[1]).float().mean() > p / 2
    assert dropout.drop(x, seed(3), p, out=x) is x and torch.equal(x, first)


def test_seeds_come_from_the_generator():
    torch.manual_seed(0)
    drawn = [dropout.draw_seed(torch.device("cpu")).item() for _ in range(3)]
    assert len(set(drawn)) == 3 and max(drawn) > 1 << 40
    torch.manual_seed(0)
    assert dropout.draw_seed(torch.device("cpu")).item() == drawn[0]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("input_wanted", [True, False])
def test_loras_product(p, input_wanted, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, weight, down, up = (torch.randn(size, generator=g) for size in ((50, 40), (24, 40), (4, 40), (24, 4)))
    grad = torch.randn(50, 24, generator=g).bfloat16()
    monkeypatch.setattr(gpu, "draw_seed", lambda device: seed(7))
    kept = dropout.drop(torch.ones(50, 40), seed(7), p) if p else torch.ones(50, 40)

    def run(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_(wants) for t, wants in
                  ((x, input_wanted), (weight, False), (down, True), (up, True))]  # fmt: skip
        y = function(*leaves)
        y.backward(grad.to(y.dtype))
        return {"y": y.detach()} | {n: leaf.grad for n, leaf in zip("xwdu", leaves, strict=True) if leaf.requires_grad}

    def plain(x, weight, down, up):
        return x @ weight.t() + 2.5 * ((x * kept.to(x.dtype)) @ down.t()) @ up.t()

    def torchs(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*leaves)

    ours = run(lambda *t: lora_linear(*t, 2.5, p, torch.bfloat16), torch.float32)
    same = run(torchs, torch.float32)
    assert ours["y"].dtype == torch.bfloat16 and ours["d"].dtype == ours["u"].dtype == torch.float32
    assert_as_good_as(ours, same, run(plain, torch.float64))
