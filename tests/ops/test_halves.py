"""Two halves of a tensor, and their gradients in one tensor."""

from __future__ import annotations

import importlib

import torch

halving = importlib.import_module("mambacus.ops.halves")


class _Doubled(torch.autograd.Function):
    """Doubles a half and writes its gradient where it shall be."""

    @staticmethod
    def forward(ctx, x):
        ctx.place = halving.gradient_place(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.place.like(grad).copy_(2 * grad)


def test_off_the_gpu_halves_are_chunks():
    tensor = torch.randn(3, 8, requires_grad=True)
    for half, chunk in zip(halving.halves(tensor), tensor.chunk(2, dim=-1), strict=True):
        assert torch.equal(half, chunk) and halving.gradient_place(half) is None


def test_gradients_written_in_place_need_no_copy():
    leaf = torch.randn(3, 8, requires_grad=True)
    tensor = leaf.clone()
    first, second = halving._split(tensor)
    joined, places = first.gradient_place._joined, []
    first.register_hook(lambda _: places.append(joined[0].data_ptr()))
    tensor.register_hook(lambda grad: places.append(grad.data_ptr()))
    (_Doubled.apply(first).sum() + (3 * _Doubled.apply(second)).sum()).backward()
    assert torch.equal(leaf.grad, torch.tensor([2.0] * 4 + [6.0] * 4).expand(3, 8))
    assert places[0] == places[1] and not joined


def test_other_gradients_are_joined():
    leaf = torch.randn(3, 8, requires_grad=True)
    first, second = halving._split(leaf)
    (_Doubled.apply(first).sum() + (3 * second).sum() + first.sum()).backward()
    assert torch.equal(leaf.grad, torch.tensor([3.0] * 4 + [3.0] * 4).expand(3, 8))
    leaf.grad = None
    first, _ = halving._split(leaf)
    _Doubled.apply(first).sum().backward()  # no gradient reaches the second half
    assert torch.equal(leaf.grad, torch.tensor([2.0] * 4 + [0.0] * 4).expand(3, 8))
