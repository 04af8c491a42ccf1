"""Twins: two readers of one tensor, whose gradients come apart."""

from __future__ import annotations

import importlib

import torch

twins_module = importlib.import_module("mambacus.ops.twins")


class _Maker(torch.autograd.Function):
    """Triples and keeps the gradients of its output apart, as the convolution on a GPU does."""

    seen: tuple[torch.Tensor | None, torch.Tensor | None]

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        y = 3 * x
        return y, y.detach()

    @staticmethod
    def backward(ctx, grad, grad_twin):
        _Maker.seen = (grad, grad_twin)
        return 3 * (grad + grad_twin)


def test_off_the_gpu_a_tensor_is_read_twice():
    tensor = torch.randn(3)
    tensor.twin = torch.randn(3)
    one, other = twins_module.twins(tensor)
    assert one is tensor and other is tensor


def test_the_gradients_come_apart(monkeypatch):
    monkeypatch.setattr(twins_module, "runs_eagerly_on_gpu", lambda tensor: True)
    leaf = torch.randn(4, requires_grad=True)
    y, twin = _Maker.apply(leaf)
    y.twin = twin
    one, other = twins_module.twins(y)
    assert one.data_ptr() == other.data_ptr() and other is twin
    (one.sum() + (2 * other).sum() + (4 * other).sum()).backward()
    assert torch.equal(_Maker.seen[0], torch.ones(4)) and torch.equal(_Maker.seen[1], torch.full((4,), 6.0))
    assert torch.equal(leaf.grad, torch.full((4,), 21.0))
    plain = torch.randn(3, requires_grad=True) * 2
    assert twins_module.twins(plain) == (plain, plain)
