"""The CPU scan against the reference in float64: results, every gradient, documents, threads, NaN, memory and time."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from op_cases import (
    SCAN_DIFFERENTIABLE,
    as_double,
    assert_as_good_as,
    documents,
    error,
    poisoned_memory,
    run,
    scan_inputs,
    threads,
)

from mambacus.ops import selective_scan, selective_state_update

reference = functools.partial(selective_scan, backend="reference")
cpu = functools.partial(selective_scan, backend="cpu")


def assert_equals_reference(inputs, **options):
    truth = run(reference, as_double(inputs), SCAN_DIFFERENTIABLE, **options)
    same_dtype = run(reference, inputs, SCAN_DIFFERENTIABLE, **options)
    with poisoned_memory():
        got = run(cpu, inputs, SCAN_DIFFERENTIABLE, **options)
    assert_as_good_as(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 31, 24, 8), (1, 33, 130, 16), (2, 70, 13, 17), (1, 40, 16, 64)], ids=str
)
def test_results_and_gradients(shape, dtype):
    assert_equals_reference(scan_inputs(*shape, dtype))
    if shape[1] > 8:
        assert_equals_reference(scan_inputs(*shape, dtype), seq_idx=documents(*shape[:2]))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
def test_without_one_optional(absent):
    assert_equals_reference(scan_inputs(2, 35, 20, 5) | {absent: None}, seq_idx=documents(2, 35))


def test_without_any_optional():
    assert_equals_reference(scan_inputs(1, 9, 8, 3) | dict.fromkeys(("D", "z", "delta_bias", "initial_state")))


def test_without_softplus():
    inputs = scan_inputs(2, 35, 20, 5)
    inputs["delta_bias"] = inputs["delta_bias"].abs()  # bare steps must be positive, or the states explode
    inputs["delta"] = inputs["delta"].abs()
    assert_equals_reference(inputs, delta_softplus=False)


def test_mixed_dtypes_and_strides():
    inputs = scan_inputs(2, 11, 16, 4)
    for name in ("x", "B", "delta_bias"):
        inputs[name] = inputs[name].bfloat16()
    inputs["C"] = inputs["C"].half()
    inputs["delta"] = inputs["delta"].double().transpose(1, 2).contiguous().transpose(1, 2)
    inputs["z"] = inputs["z"].flip(0)
    inputs["A"] = inputs["A"].T.contiguous().T
    assert_equals_reference(inputs)


def test_large_steps_and_decays_stay_finite():
    inputs = scan_inputs(1, 40, 8, 4)
    inputs["delta"] = inputs["delta"] * 30
    inputs["A"] = inputs["A"] * 100
    assert_equals_reference(inputs)


def test_only_final_state_has_a_gradient():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 40, 8, 4).items()}
    grads = {}
    for name, op in (("got", cpu), ("want", reference)):
        _, final_state = op(**inputs)
        grads[name] = torch.autograd.grad(final_state.square().sum(), [inputs["x"], inputs["initial_state"]])
    for got, want in zip(grads["got"], grads["want"], strict=True):
        assert error(got, want.double()) < 1e-6


def test_packed_equals_separate():
    first, second = scan_inputs(1, 37, 24, 16, seed=1), scan_inputs(1, 20, 24, 16, seed=2)
    per_token = ("x", "delta", "B", "C", "z")
    second |= {k: first[k] for k in ("A", "D", "delta_bias")} | {"initial_state": None}
    packed = {k: torch.cat([first[k], second[k]], dim=1) if k in per_token else v for k, v in first.items()}
    ids = torch.tensor([[0] * 37 + [1] * 20])
    got, one, two = (
        run(functools.partial(cpu, seq_idx=s), i, SCAN_DIFFERENTIABLE)["y"]
        for i, s in ((packed, ids), (first, None), (second, None))
    )
    torch.testing.assert_close(got, torch.cat([one, two], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Outputs, final state and every gradient are those without padding, even where padding holds NaN."""
    inputs = scan_inputs(2, 37, 24, 16)
    pads = (0, 0, 9, 0) if side == "left" else (0, 0, 0, 9)
    real = slice(9, None) if side == "left" else slice(0, 37)
    per_token = ("x", "delta", "B", "C", "z")
    padded = {
        k: torch.nn.functional.pad(v, pads, value=float("nan")) if k in per_token else v for k, v in inputs.items()
    }
    ids = torch.nn.functional.pad(torch.zeros(2, 37, dtype=torch.int64), pads[2:], value=-1)

    def losses(op_inputs, seq_idx, tokens):
        leaves = {k: v.detach().requires_grad_() for k, v in op_inputs.items()}
        y, final_state = cpu(**leaves, seq_idx=seq_idx)
        weights = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(3))
        loss = (y[:, tokens] * weights).sum() + final_state.square().sum()
        return y, final_state, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    y, final_state, grads = losses(inputs, None, slice(None))
    padded_y, padded_final, padded_grads = losses(padded, ids, real)
    assert torch.equal(padded_y[:, real], y)
    assert torch.equal(padded_final, final_state)
    assert (padded_y[ids < 0] == 0).all()
    for name, want in grads.items():
        got = padded_grads[name]
        if name in per_token:
            assert (got[ids < 0] == 0).all(), name
            got = got[:, real]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def test_row_of_padding_passes_the_state_through():
    inputs = scan_inputs(2, 5, 8, 4)
    _, final_state = cpu(**inputs, seq_idx=torch.full((2, 5), -1))
    assert torch.equal(final_state, inputs["initial_state"])


def test_bit_identical_for_any_number_of_threads_and_every_run():
    inputs = scan_inputs(2, 70, 160, 16)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run(cpu, inputs, SCAN_DIFFERENTIABLE, seq_idx=documents(2, 70)))
    for other in results[1:]:
        for name, want in results[0].items():
            assert torch.equal(other[name], want), name


@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "z"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(name):
    inputs = scan_inputs(2, 40, 16, 4)
    inputs[name] = inputs[name].clone()
    inputs[name][0, 20, 3] = float("nan")
    ids = torch.zeros(2, 40, dtype=torch.int32)
    ids[:, 30:] = 1
    y, _ = cpu(**inputs, seq_idx=ids)
    channels = slice(3, 4) if name in ("x", "delta", "z") else slice(None)
    tokens = slice(20, 30) if name in ("x", "delta", "B") else slice(20, 21)
    assert y[0, tokens, channels].isnan().all()
    y[0, tokens, channels] = 0
    assert y.isfinite().all()


def test_infinity_does_not_become_a_number():
    inputs = scan_inputs(1, 4, 8, 4)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][0, 1, 2] = float("inf")
    y, final_state = cpu(**inputs)
    assert not y[0, 1:, 2].isfinite().any() and not final_state[0, 2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 130, 17), (2, 13, 1), (16, 96, 16)], ids=str)
def test_update(shape, dtype):
    batch, d_inner, d_state = shape
    inputs = scan_inputs(batch, 1, d_inner, d_state, dtype)
    one = {k: v.squeeze(1) if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    state = one.pop("initial_state")
    for absent in (None, "D", "z", "delta_bias"):
        given = one if absent is None else one | {absent: None}
        truth = selective_state_update(state.double(), **as_double(given))
        same_dtype = selective_state_update(state, **given, backend="reference")
        with poisoned_memory():
            got = selective_state_update(state, **given, backend="cpu")
        names = ("y", "state")
        assert_as_good_as(*(dict(zip(names, r, strict=True)) for r in (got, same_dtype, truth)))
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("d_inner", "d_state"), [(96, 16), (13, 5)], ids=["whole vectors", "odd"])
def test_update_in_given_memory(d_inner, d_state, backend):
    inputs = scan_inputs(3, 1, d_inner, d_state)
    one = {k: v.squeeze(1) if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    state = one.pop("initial_state")
    want_y, want = selective_state_update(state, **one, backend=backend)
    elsewhere, narrow = torch.full_like(state, torch.nan), torch.full_like(state, torch.nan, dtype=torch.bfloat16)
    for out in (elsewhere, narrow, state):
        y, new_state = selective_state_update(state, **one, out=out, backend=backend)
        assert new_state is out and torch.equal(out, want.to(out.dtype)) and torch.equal(y, want_y)
    with pytest.raises(ValueError, match="out: expected None where a gradient is needed"):
        selective_state_update(state.requires_grad_(), **one, out=elsewhere)


def test_update_is_differentiable_and_deterministic():
    inputs = scan_inputs(4, 1, 640, 16)
    one = {k: v.squeeze(1) if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    state = one.pop("initial_state").requires_grad_()
    with torch.no_grad():
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(selective_state_update(state, **one, backend="cpu"))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in selective_state_update(state, **one, backend=backend)), state)
        for backend in ("cpu", "reference")
    ]
    assert error(grads[0][0], grads[1][0].double()) < 1e-6


COSTS = """
import resource, time, torch
from mambacus.ops import selective_scan
torch.set_num_threads(1)
def step(seqlen, d_inner, d_state):
    x, delta, z = (torch.randn(1, seqlen, d_inner, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(1, seqlen, d_state, requires_grad=True) for _ in range(2))
    A = torch.rand(d_inner, d_state).neg().requires_grad_()
    start = time.process_time()
    y, _ = selective_scan(x, delta, A, B, C, None, z, backend="cpu")
    y.backward(y.detach())
    return time.process_time() - start
step(64, 64, 16)
short = min(step(512, 64, 16) for _ in range(5))
long = min(step(4096, 64, 16) for _ in range(5))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192, 256, 64)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(long / short, grown)
"""


def test_time_and_memory_are_linear_in_seqlen():
    done = subprocess.run([sys.executable, "-c", COSTS], capture_output=True, text=True, check=True)
    ratio, grown = map(float, done.stdout.split())
    assert ratio < 20, "8 times the tokens should take about 8 times as long"
    tokens = 8192 * 256 * 4  # bytes of one (batch, seqlen, d_inner) tensor; the states of all tokens are 64 of them
    assert grown < 24 * tokens, f"{grown / tokens:.0f} tensors of the size of x"
