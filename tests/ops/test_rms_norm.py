"""The normalisation against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import assert_as_good_as, poisoned_memory, threads

from mambacus.ops import rms_norm


def by_torch(x, weight):
    normed = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight.shape, eps=1e-5)
    return normed.to(weight.dtype) * weight


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16,), (3, 48), (2, 9, 80), (3, 5)], ids=str)
def test_equals_torch(shape, dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(weight_dtype)
    with poisoned_memory():
        got = rms_norm(x, weight, 1e-5)
    results = {"y": got}, {"y": by_torch(x, weight)}, {"y": by_torch(x.double(), weight.double())}
    assert_as_good_as(*results)


def test_gradients_are_those_of_torch():
    x, weight = torch.randn(3, 48, requires_grad=True), torch.randn(48, requires_grad=True)
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), (x, weight))
    want = torch.autograd.grad(F.rms_norm(x, (48,), weight, 1e-5).square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_with_gaps_nan_and_any_number_of_threads():
    x = torch.randn(300, 1024)[:, :512]
    x[7, 3] = float("nan")
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(rms_norm(x, torch.ones(512), 1e-5))
    assert results[0][7].isnan().all()
    kept = [torch.cat([y[:7], y[8:]]) for y in results]
    assert kept[0].isfinite().all() and torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
