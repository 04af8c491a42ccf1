"""Products with quantised weights: the format, the kernels against plain torch, and where they step aside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import poisoned_memory, threads

from mambacus.ops import quantised_linear, quantised_rows
from mambacus.ops.quantised_linear import FORMATS, interface, pack, quantised_linear_ref, unpack
from mambacus.ops.tape import Tape

SHAPES = [((1,), 80, 96), ((3,), 50, 48), ((2, 2), 97, 200), ((7,), 1, 17), ((16,), 145, 384), ((65,), 50, 130)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)


def inputs(rows, outputs, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, length), (outputs, length), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(dtype), weight, bias


@EACH_FORMAT
@pytest.mark.parametrize("length", [16, 64, 100, 128, 333])
def test_weights_are_kept_to_half_a_step_of_their_group(name, length):
    _, weight, _ = inputs((1,), 5, length)
    packed = pack(weight, name)
    found = unpack(packed)
    assert found.shape == weight.shape
    steps = packed.scales.float().abs().repeat_interleave(packed.format.group, dim=1)[:, :length]
    levels = found / steps
    assert torch.equal(levels, levels.round()) and levels.abs().max() <= (127 if name == "int8" else 8)
    inside = weight.abs() <= (127 if name == "int8" else 7) * steps
    assert ((found - weight).abs() <= 0.5001 * steps)[inside].all()
    assert inside.all() if name == "int8" else inside.float().mean() > 0.9


def test_a_searched_scale_loses_less_than_that_of_the_largest_weight():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    groups = weight.view(64, 4, 32)
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / step).round() * step
    assert (unpack(pack(weight, "int4")) - weight).norm() < 0.9 * (plain - groups).norm()


@EACH_FORMAT
def test_zeros_and_a_matrix_of_one_value_are_exact(name):
    assert unpack(pack(torch.zeros(3, 70), name)).eq(0).all()
    torch.testing.assert_close(
        unpack(pack(torch.full((3, 70), -0.5), name)), torch.full((3, 70), -0.5), rtol=5e-3, atol=0
    )


def test_bytes_are_those_of_the_format():
    weight = torch.randn(10, 256)
    assert pack(weight, "int8").nbytes == 10 * 256 * (1 + 2 / 64)
    assert pack(weight, "int4").nbytes == 10 * 256 * (0.5 + 2 / 32)


@EACH_FORMAT
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(name, shape, dtype):
    x, weight, bias = inputs(*shape, dtype)
    packed = pack(weight, name)
    for shift in (bias, None):
        truth = F.linear(x.double(), unpack(packed).double(), None if shift is None else shift.double())
        with poisoned_memory():
            got = quantised_linear(x, packed, shift)
        assert got.dtype == dtype and got.shape == truth.shape
        sizes, weights = x.double().abs(), unpack(packed).double().abs()
        room = sizes.amax(-1, keepdim=True) / 16383 / 2 * weights.sum(-1)  # of the inputs, rounded
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert ((got - truth).abs() <= room + rounding * (truth.abs() + F.linear(sizes, weights))).all()


@EACH_FORMAT
def test_inputs_are_rounded_less_than_bfloat16_would(name):
    x, weight, _ = inputs((4,), 200, 1536)
    x[:, 7] *= 1000  # one input outweighs all others
    packed = pack(weight, name)
    truth = F.linear(x.double(), unpack(packed).double())
    got = quantised_linear(x, packed)
    coarse = F.linear(x.bfloat16().double(), unpack(packed).double())
    assert (got - truth).norm() < (coarse - truth).norm()


@EACH_FORMAT
def test_few_and_many_rows_agree(name, monkeypatch):
    x, weight, bias = inputs((9,), 130, 300)
    packed = pack(weight, name)
    few = quantised_linear(x, packed, bias)
    monkeypatch.setattr(interface, "FEW_ROWS", 0)
    monkeypatch.setattr(interface, "UNPACKED_WEIGHTS", 300 * 50)  # several pieces
    many = quantised_linear(x, packed, bias)
    torch.testing.assert_close(few, many, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(many, quantised_linear_ref(x, packed, bias), rtol=1e-5, atol=1e-5)


@EACH_FORMAT
def test_rows_are_those_of_the_reference(name):
    _, weight, _ = inputs((1,), 40, 200)
    packed = pack(weight, name)
    numbers = torch.tensor([[3, 39], [0, 3]])
    with poisoned_memory():
        found = quantised_rows(packed, numbers)
    assert torch.equal(found, unpack(packed)[numbers])


@EACH_FORMAT
def test_rows_may_be_named_by_int32(name):
    packed = pack(inputs((1,), 40, 200)[1], name)
    numbers = torch.tensor([[3, 39], [0, 3]], dtype=torch.int32)
    assert torch.equal(quantised_rows(packed, numbers), unpack(packed)[numbers.long()])
    with pytest.raises(ValueError, match=r"rows: expected int64 or int32, got torch\.float32"):
        quantised_rows(packed, numbers.float())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("wrong", [-1, 40, 2**40, -(2**62)])
def test_rows_that_are_not_there_are_refused(kernel, wrong, monkeypatch):
    packed = pack(inputs((1,), 40, 200)[1], "int8")
    if not kernel:
        monkeypatch.setattr(interface, "runs_eagerly_on_cpu", lambda tensor: False)
    with pytest.raises(IndexError, match=f"index {wrong} is out of range: there are 40 rows" if kernel else "range"):
        quantised_rows(packed, torch.tensor([3, wrong, 7]))


@EACH_FORMAT
def test_a_tape_that_is_run_again_reads_nothing_but_the_weights(name):
    packed, numbers = pack(inputs((1,), 40, 200)[1], name), torch.tensor([3, 7, 9])
    tape, rows = Tape.record(lambda: quantised_rows(packed, numbers))
    assert len(tape) == 1  # the check is no step
    numbers.copy_(torch.tensor([2**40, 39, -1]))
    tape.replay()
    assert rows[[0, 2]].isnan().all() and torch.equal(rows[1], unpack(packed)[39])


@EACH_FORMAT
def test_bit_identical_for_any_number_of_threads_and_rows(name):
    x, weight, _ = inputs((6,), 1000, 1024)
    packed = pack(weight, name)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(quantised_linear(x, packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for row in range(6):
        assert torch.equal(quantised_linear(x[row], packed), results[0][row])


@EACH_FORMAT
def test_the_largest_sums_do_not_overflow(name):
    x = torch.full((5, 4096), 3.0)
    weight = torch.full((7, 4096), -2.0)
    torch.testing.assert_close(
        quantised_linear(x, pack(weight, name)), torch.full((5, 7), -6.0 * 4096), rtol=5e-3, atol=0
    )


@EACH_FORMAT
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(name, value):
    x, weight, _ = inputs((5,), 50, 48)
    x[2, 7] = value
    y = quantised_linear(x, pack(weight, name))
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


def test_a_row_of_zeros_gives_zeros():
    _, weight, bias = inputs((1,), 50, 48)
    assert torch.equal(quantised_linear(torch.zeros(2, 48), pack(weight, "int8"), bias), bias.expand(2, -1))


def test_other_dtypes_run_the_reference():
    x, weight, _ = inputs((2,), 50, 48)
    packed = pack(weight, "int8")
    assert torch.equal(quantised_linear(x.half(), packed), quantised_linear_ref(x.half(), packed))
    assert quantised_linear(x[:0], packed).shape == (0, 50)


def test_wrong_shapes_and_gradients_are_refused():
    x, weight, _ = inputs((2,), 50, 48)
    packed = pack(weight, "int4")
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., 48\), got \(2, 47\)"):
        quantised_linear(x[:, :47], packed)
    with pytest.raises(ValueError, match="no gradient"):
        quantised_linear(x.requires_grad_(), packed)
    with torch.no_grad():
        quantised_linear(x, packed)
