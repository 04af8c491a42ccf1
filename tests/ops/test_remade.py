"""A tensor that the backward pass makes again instead of keeping."""

from __future__ import annotations

import weakref

import torch

from mambacus.ops import remade


def test_the_tensor_is_made_again_and_others_are_kept():
    leaf, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    made = []

    def make():
        assert not torch.is_grad_enabled()
        made.append(1)
        return 3 * leaf

    x = 3 * leaf
    with remade(x, make):
        y = x * weight
    assert not made
    y.sum().backward()
    assert made == [1]
    assert torch.equal(leaf.grad, 3 * weight) and torch.equal(weight.grad, 3 * leaf)


def test_views_of_other_shapes_are_kept():
    x = torch.randn(6, requires_grad=True) * 2
    with remade(x, lambda: x.new_zeros(())):
        y = x[:3].exp() + x.view(2, 3)[0].square()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = x[:3].exp() + 2 * x[:3]
    torch.testing.assert_close(gradient[:3], expected)


def test_the_tensor_is_given_back_at_once():
    """Torch keeps the functions of the context as long as what they return: they must not hold the tensor."""
    leaf, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    x = 3 * leaf
    alive = weakref.ref(x)
    with remade(x, lambda: 3 * leaf):
        y = x * weight
    del x
    assert alive() is None
    y.sum().backward()
    assert torch.equal(weight.grad, 3 * leaf)
