"""The CPU convolution against the reference in float64: results, every gradient, documents, threads, NaN."""

from __future__ import annotations

import functools

import pytest
import torch
from op_cases import (
    CONV_DIFFERENTIABLE,
    as_double,
    assert_as_good_as,
    conv_inputs,
    documents,
    error,
    poisoned_memory,
    run,
    threads,
)

from mambacus.ops import causal_conv1d, causal_conv1d_update

reference = functools.partial(causal_conv1d, backend="reference")
cpu = functools.partial(causal_conv1d, backend="cpu")


def assert_equals_reference(inputs, **options):
    truth = run(reference, as_double(inputs), CONV_DIFFERENTIABLE, **options)
    same_dtype = run(reference, inputs, CONV_DIFFERENTIABLE, **options)
    with poisoned_memory():
        got = run(cpu, inputs, CONV_DIFFERENTIABLE, **options)
    assert_as_good_as(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 4), (2, 33, 24, 4), (1, 65, 130, 2), (2, 9, 13, 1), (1, 3, 16, 7)], ids=str
)
def test_results_and_gradients(shape, dtype):
    assert_equals_reference(conv_inputs(*shape, dtype))
    if shape[1] > 8:
        assert_equals_reference(conv_inputs(*shape, dtype), seq_idx=documents(*shape[:2]))


@pytest.mark.parametrize("absent", ["bias", "initial_state"])
def test_without_one_optional(absent):
    assert_equals_reference(conv_inputs(2, 35, 20, 4) | {absent: None}, seq_idx=documents(2, 35))


def test_without_activation():
    assert_equals_reference(conv_inputs(2, 35, 20, 4), activation=None)


def test_mixed_dtypes_and_strides():
    inputs = conv_inputs(2, 11, 16, 4)
    inputs["weight"] = inputs["weight"].bfloat16().T.contiguous().T
    inputs["bias"] = inputs["bias"].double()
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2).flip(0)
    assert_equals_reference(inputs)


def test_packed_equals_separate():
    first, second = conv_inputs(1, 34, 16, 4, seed=1), conv_inputs(1, 20, 16, 4, seed=2)
    second |= {k: first[k] for k in ("weight", "bias")} | {"initial_state": None}
    packed = first | {"x": torch.cat([first["x"], second["x"]], dim=1)}
    y, final_state = cpu(**packed, seq_idx=torch.tensor([[0] * 34 + [1] * 20]))
    (one, _), (two, want_final) = cpu(**first), cpu(**second)
    assert torch.equal(y, torch.cat([one, two], dim=1)) and torch.equal(final_state, want_final)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    inputs = conv_inputs(2, 34, 16, 4)
    pads = (0, 0, 9, 0) if side == "left" else (0, 0, 0, 9)
    real = slice(9, None) if side == "left" else slice(0, 34)
    padded = inputs | {"x": torch.nn.functional.pad(inputs["x"], pads, value=float("nan"))}
    ids = torch.nn.functional.pad(torch.zeros(2, 34, dtype=torch.int64), pads[2:], value=-1)
    weights = torch.randn(2, 34, 16, generator=torch.Generator().manual_seed(3))

    def losses(op_inputs, seq_idx, tokens):
        leaves = {k: v.detach().requires_grad_() for k, v in op_inputs.items()}
        y, final_state = cpu(**leaves, seq_idx=seq_idx)
        loss = (y[:, tokens] * weights).sum() + final_state.square().sum()
        return y, final_state, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    y, final_state, grads = losses(inputs, None, slice(None))
    padded_y, padded_final, padded_grads = losses(padded, ids, real)
    assert torch.equal(padded_y[:, real], y) and torch.equal(padded_final, final_state)
    assert (padded_y[ids < 0] == 0).all() and (padded_grads["x"][ids < 0] == 0).all()
    padded_grads["x"] = padded_grads["x"][:, real]
    for name, want in grads.items():
        torch.testing.assert_close(padded_grads[name], want, rtol=1e-5, atol=1e-6, msg=name)


def test_bit_identical_for_any_number_of_threads_and_every_run():
    inputs = conv_inputs(2, 200, 160, 4)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run(cpu, inputs, CONV_DIFFERENTIABLE, seq_idx=documents(2, 200)))
    for other in results[1:]:
        for name, want in results[0].items():
            assert torch.equal(other[name], want), name


def test_nan_reaches_what_depends_on_it_and_nothing_else():
    inputs = conv_inputs(1, 40, 16, 4)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][0, 20, 3] = float("nan")
    y, final_state = cpu(**inputs)
    assert y[0, 20:24, 3].isnan().all() and final_state.isfinite().all()
    y[0, 20:24, 3] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 130, 2), (16, 96, 4)], ids=str)
def test_update(shape, dtype):
    batch, d_inner, d_conv = shape
    inputs = conv_inputs(batch, 1, d_inner, d_conv, dtype)
    x, state = inputs["x"].squeeze(1), inputs["initial_state"]
    for bias in (inputs["bias"], None):
        given = (x, state, inputs["weight"], bias)
        truth = causal_conv1d_update(*(None if t is None else t.double() for t in given))
        same_dtype = causal_conv1d_update(*given, backend="reference")
        with poisoned_memory():
            got = causal_conv1d_update(*given, backend="cpu")
        assert_as_good_as(*(dict(zip(("y", "state"), r, strict=True)) for r in (got, same_dtype, truth)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("d_inner", [96, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_update_in_given_memory(dtype, d_inner, backend):
    inputs = conv_inputs(3, 1, d_inner, 4, dtype)
    x, state, rest = inputs["x"].squeeze(1), inputs["initial_state"], (inputs["weight"], inputs["bias"])
    want_y, want = causal_conv1d_update(x, state, *rest, backend=backend)
    for out in (torch.full_like(state, torch.nan), torch.full_like(state, torch.nan, dtype=torch.float32), state):
        y, new_state = causal_conv1d_update(x, state, *rest, out=out, backend=backend)
        assert new_state is out and torch.equal(out, want.to(out.dtype)) and torch.equal(y, want_y)
    with pytest.raises(ValueError, match="out: expected None where a gradient is needed"):
        causal_conv1d_update(x, state.requires_grad_(), *rest, out=out)


def test_update_is_differentiable():
    inputs = conv_inputs(2, 1, 16, 4)
    x, state = inputs["x"].squeeze(1), inputs["initial_state"].requires_grad_()
    grads = []
    for backend in ("cpu", "reference"):
        results = causal_conv1d_update(x, state, inputs["weight"], backend=backend)
        grads.append(torch.autograd.grad(sum(t.square().sum() for t in results), state)[0])
    assert error(grads[0], grads[1].double()) < 1e-6
