"""The vector functions, each through a small kernel, against numpy and torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit
from op_cases import poisoned_memory

from mambacus.ops import simd
from mambacus.ops.threads import Kernel


def apply(function, values: torch.Tensor) -> torch.Tensor:
    """Return the vector function of float32 values, LANES at a time."""
    compiled = njit(function)

    def body(p, thread, threads):
        for i in range(0, p[2], simd.VECTOR):
            simd.store(p[1] + i, compiled(simd.load(p[0] + i)))

    values = torch.nn.functional.pad(values, (0, -len(values) % simd.LANES))
    with poisoned_memory():
        result = torch.empty_like(values)
    Kernel(body, cache=False)([values.data_ptr(), result.data_ptr(), values.nbytes], 1)
    return result


def relative_error(got, want, values):
    got, want = got[: len(values)].double(), want.double()
    return ((got - want).abs() / want.abs()).max().item()


GRID = torch.cat([torch.linspace(-80, 80, 20001), -torch.logspace(-30, 1, 2000), torch.logspace(-30, 1, 2000)])


def test_exp2():
    values = GRID * 1.5
    assert relative_error(apply(lambda v: simd.exp2(v), values), torch.exp2(values.double()), values) < 2.5e-7
    assert apply(lambda v: simd.exp2(v), torch.zeros(8))[0] == 1  # a zero step leaves the state alone


@pytest.mark.parametrize(
    ("function", "truth", "bound"),
    [
        (lambda v: simd.exp(v), torch.exp, 2.5e-7),
        (lambda v: simd.sigmoid(v), torch.sigmoid, 4e-7),
        (lambda v: simd.softplus(v), lambda v: torch.log1p(torch.exp(v)), 4e-7),
    ],
    ids=["exp", "sigmoid", "softplus"],
)
def test_functions(function, truth, bound):
    assert relative_error(apply(function, GRID), truth(GRID.double()), GRID) < bound


@pytest.mark.parametrize(
    "function",
    [lambda v: simd.exp2(v), lambda v: simd.exp(v), lambda v: simd.sigmoid(v), lambda v: simd.softplus(v)],
    ids=["exp2", "exp", "sigmoid", "softplus"],
)
def test_extremes(function):
    nan, low, high, most_negative, most_positive = apply(
        function, torch.tensor([float("nan"), -1e30, 1e30, -float("inf"), float("inf")])
    )[:5]
    assert nan.isnan()
    assert 0 <= low < 1e-37 and not most_negative.abs() > 1e-37
    assert high >= 1 and not most_positive < 1


def test_bfloat16_rounds_as_torch_does():
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32).view(np.float32))
    ties = (torch.arange(1 << 15, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    for values in (bits, ties):
        with poisoned_memory():
            halves, back = torch.empty(len(values), dtype=torch.bfloat16), torch.empty(len(values))

        def body(p, thread, threads):
            for i in range(0, p[3], simd.LANES):
                simd.store_bfloat16(p[1] + 2 * i, simd.load(p[0] + 4 * i))
                simd.store(p[2] + 4 * i, simd.load_bfloat16(p[1] + 2 * i))

        Kernel(body, cache=False)([values.data_ptr(), halves.data_ptr(), back.data_ptr(), len(values)], 1)
        assert torch.equal(halves.nan_to_num(), values.bfloat16().nan_to_num())
        assert torch.equal(halves.isnan(), values.isnan())
        assert torch.equal(back.nan_to_num(), halves.float().nan_to_num())


def test_total_clamp_and_select():
    values = torch.arange(1.0, simd.LANES + 1)
    assert apply(lambda v: simd.splat(simd.total(v)), values)[0] == values.sum()
    low, high = np.float32(2.0), np.float32(3.0)
    assert torch.equal(apply(lambda v: simd.clamp(v, low, high), values), values.clamp(2, 3))
    signs = values * torch.tensor([1.0, -1.0]).repeat(simd.LANES // 2)
    picked = apply(lambda v: simd.where_negative(v, simd.absolute(v), simd.splat(0.0)), signs)
    assert torch.equal(picked, torch.where(signs < 0, signs.abs(), 0))
