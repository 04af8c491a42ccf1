"""Inputs of the ops, the truth about them in float64, and the rule by which a kernel is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
SCAN_DIFFERENTIABLE = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CONV_DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")


def scan_inputs(
    batch: int, seqlen: int, d_inner: int, d_state: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """All arguments of the scan; x and z, B and C are halves of one tensor: their rows are not contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, z = normal(batch, seqlen, 2 * d_inner).to(dtype).chunk(2, dim=-1)
    B, C = normal(batch, seqlen, 2 * d_state).to(dtype).chunk(2, dim=-1)
    A = -4 * torch.rand(d_inner, d_state, generator=generator)
    return {
        "x": x, "delta": normal(batch, seqlen, d_inner).to(dtype), "A": A, "B": B, "C": C, "D": normal(d_inner), "z": z,
        "delta_bias": normal(d_inner) - 3, "initial_state": normal(batch, d_inner, d_state),
    }  # fmt: skip


def conv_inputs(
    batch: int, seqlen: int, d_inner: int, d_conv: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """All arguments of the convolution; the rows of x are not contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, _ = normal(batch, seqlen, 2 * d_inner).chunk(2, dim=-1)
    return {
        "x": x, "weight": normal(d_inner, d_conv), "bias": normal(d_inner),
        "initial_state": normal(batch, d_inner, d_conv),
    }  # fmt: skip


def documents(batch: int, seqlen: int) -> Tensor:
    """Ids with left padding, right padding, documents of one token, and an id that comes back later."""
    ids = torch.zeros(batch, seqlen, dtype=torch.int32)
    for row in range(batch):
        cuts = [(7 * row + 5 * k) % seqlen for k in (1, 2, 3)]
        for cut in cuts:
            ids[row, cut:] += 1
        ids[row] %= 3
    ids[0, :3] = -1
    ids[-1, -2:] = -7
    return ids


def run(op: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, names: tuple[str, ...], **options: Any) -> Inputs:
    """Return y, final_state and the gradient of every given input, for fixed random gradients of both results."""
    leaves = {k: None if inputs.get(k) is None else inputs[k].detach().requires_grad_() for k in names}
    y, final_state = op(**leaves, **options)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final_state)]
    kept = [k for k in names if leaves[k] is not None]
    found = torch.autograd.grad([y, final_state], [leaves[k] for k in kept], grads)
    return {"y": y.detach(), "final_state": final_state.detach()} | dict(zip(kept, found, strict=True))


def as_double(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative error in the 2-norm; NaN if anything is NaN."""
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as(got: Inputs, same_dtype: Inputs, truth: Inputs, floor: float = 5e-7) -> None:
    """Every result has at most twice the error that the reference makes in the same dtype, plus a floor."""
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        assert got[name].shape == want.shape, name
        assert got[name].dtype == same_dtype[name].dtype, name
        allowed = 2 * error(same_dtype[name], want) + floor
        assert error(got[name], want) <= allowed, (name, error(got[name], want), allowed)  # false for NaN


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that a result that was never written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
