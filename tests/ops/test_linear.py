"""The matrix product for a CPU against torch in float64, and that it steps aside where it must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import assert_as_good_as, poisoned_memory, threads
from torch import nn

from mambacus.ops import Linear, float32_output, linear
from mambacus.ops.linear import interface
from mambacus.ops.linear.interface import HEAD_TOKENS
from mambacus.ops.tape import Tape

SHAPES = [
    ((1,), 80, 96),
    ((3,), 50, 48),
    ((2, 2), 97, 64),
    ((7,), 1, 16),
    ((16,), 145, 80),
    ((33,), 50, 48),
    ((65,), 50, 48),
]


def inputs(rows, outputs, length, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, length), (outputs, length), (outputs,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, dtype, monkeypatch):
    monkeypatch.setattr(interface, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(interface, "CONVERTED_WEIGHTS", 48 * 16)  # several pieces
    x, weight, bias = inputs(*shape, dtype)
    for shift in (bias, None):
        truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        same_dtype = F.linear(x, weight, shift)
        with poisoned_memory():
            got = linear(x, weight, shift)
        assert_as_good_as({"y": got}, {"y": same_dtype}, {"y": truth})


@pytest.fixture(params=["pairs", "widened"])
def kernel(request, monkeypatch):
    """Run bfloat16 by the kernel for the processor's own products (in plain ones where it has none), or without."""
    from mambacus.ops.linear import cpu

    calls = []
    original = cpu.few_rows_by_pairs
    monkeypatch.setattr(cpu, "multiplies_pairs", lambda: request.param == "pairs")
    monkeypatch.setattr(cpu, "few_rows_by_pairs", lambda *a: calls.append(1) or original(*a))
    return request.param, calls


@pytest.mark.parametrize("rows", [*range(1, 18), 33, 64])
def test_every_number_of_rows(rows, kernel):
    name, calls = kernel
    for outputs, length in ((1, 16), (5, 48), (13, 80), (145, 112), (301, 768)):  # alone, left over, in streams
        x, weight, _ = inputs((rows,), outputs, length, torch.bfloat16)
        truth = F.linear(x.double(), weight.double())
        with poisoned_memory():
            got = linear(x, weight)
        assert_as_good_as({"y": got}, {"y": F.linear(x, weight)}, {"y": truth})
    assert len(calls) == (5 if name == "pairs" and rows >= 4 else 0)


def test_bfloat16_is_summed_in_float32(kernel):
    from mambacus.ops.linear.cpu import few_rows

    for rows in (1, 2, 4, 8, 16, 20):
        x, weight, _ = inputs((rows,), 50, 1536, torch.bfloat16)
        truth = F.linear(x.double(), weight.double())
        with poisoned_memory():
            got = few_rows(x, weight)
        assert_as_good_as({"y": got}, {"y": F.linear(x.float(), weight.float())}, {"y": truth})


def test_bfloat16_is_bit_identical_for_any_number_of_threads(kernel):
    for rows in (3, 6, 16):
        x, weight, _ = inputs((rows,), 1025, 512, torch.bfloat16)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(linear(x, weight))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_bfloat16_row_does_not_depend_on_what_is_beside_it(kernel):
    from mambacus.ops.linear.cpu import few_rows

    x, weight, _ = inputs((13,), 50, 768, torch.bfloat16)
    spoilt = x.clone()
    spoilt[5] = float("nan")
    together, beside_nan = few_rows(x, weight), few_rows(spoilt, weight)
    assert beside_nan[5].isnan().all()
    others = [row for row in range(13) if row != 5]
    assert torch.equal(beside_nan[others], together[others])
    for row in range(13):
        torch.testing.assert_close(few_rows(x[row], weight), together[row], rtol=1e-5, atol=1e-4)


def test_a_tape_keeps_the_memory_of_the_kernel(kernel):
    x, weight, _ = inputs((16,), 50, 768, torch.bfloat16)
    other = inputs((16,), 50, 768, torch.bfloat16)[0].flip(0).clone()
    want = linear(other, weight)
    with torch.no_grad():
        tape, y = Tape.record(lambda: linear(x, weight))
    taken = [torch.full((size,), float("nan")) for size in (16 * 384, 16 * 768, 2 * 16 * 384, 2 * 16 * 768)]
    x.copy_(other)
    y.fill_(float("nan"))
    tape.replay()
    assert torch.equal(y, want) and all(t.isnan().all() for t in taken)


def test_the_instruction_for_pairs_is_what_llvm_makes_of_its_name():
    from llvmlite import binding

    from mambacus.ops.bfloat16_simd import INSTRUCTION

    if "x86" not in binding.get_default_triple():
        pytest.skip("an instruction of x86 processors")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    floats, ints = "<16 x float>", "<16 x i32>"
    module = binding.parse_assembly(f"""
        declare {floats} @{INSTRUCTION}({floats}, {ints}, {ints})
        define {floats} @f({floats} %total, {ints} %a, {ints} %b) {{
            %sum = call {floats} @{INSTRUCTION}({floats} %total, {ints} %a, {ints} %b)
            ret {floats} %sum
        }}""")
    target = binding.Target.from_default_triple().create_target_machine(features="+avx512f,+avx512bw,+avx512bf16")
    assert "vdpbf16ps" in target.emit_assembly(module)


def count_calls(monkeypatch):
    from mambacus.ops.linear import cpu

    calls = []
    original = cpu.few_rows
    monkeypatch.setattr(cpu, "few_rows", lambda *a: calls.append(1) or original(*a))
    return calls


def test_runs_the_kernel_for_few_rows_only(monkeypatch):
    calls = count_calls(monkeypatch)
    x, weight, _ = inputs((1,), 50, 48, torch.float32)
    linear(x, weight)
    linear(x.expand(interface.FEW_ROWS + 1, -1), weight)
    assert len(calls) == 1


def test_leaves_to_torch_what_is_not_its_own(monkeypatch):
    calls = count_calls(monkeypatch)
    x, weight, bias = inputs((2,), 50, 48, torch.float32)
    linear(x.double(), weight.double())
    linear(x[:, :47], weight[:, :47])
    linear(x, inputs((2,), 48, 50, torch.float32)[1].T)
    linear(x[:0], weight)
    linear(x.to("meta"), weight.to("meta"))
    linear(x, weight.requires_grad_())
    with torch.no_grad(), torch.autocast("cpu"):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert not calls
    with torch.no_grad():
        linear(x, weight)
    assert calls


def test_gradients_are_those_of_torch():
    x, weight, bias = (t.requires_grad_() for t in inputs((3,), 50, 48, torch.float32))
    got = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias))
    want = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_wrong_shapes_raise_as_torch_does():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(2, 32), torch.randn(5, 48))


def test_bit_identical_for_any_number_of_threads():
    x, weight, _ = inputs((5,), 1024, 512, torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(linear(x, weight))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_row_does_not_depend_on_the_rows_beside_it_beyond_rounding():
    x, weight, _ = inputs((6,), 50, 48, torch.float32)
    together = linear(x, weight)
    for row in range(6):
        torch.testing.assert_close(linear(x[row], weight), together[row], rtol=1e-5, atol=1e-6)


def test_nan_is_seen():
    x, weight, _ = inputs((5,), 50, 48, torch.float32)
    x[2, 7] = float("nan")
    y = linear(x, weight)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_module_is_an_ordinary_linear():
    module = Linear(48, 5)
    assert isinstance(module, nn.Linear) and list(module.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, HEAD_TOKENS, HEAD_TOKENS + 1, 2 * HEAD_TOKENS + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_pieces_gives_what_it_gives_whole(tokens: int, dtype: torch.dtype) -> None:
    layer = Linear(32, 48, bias=False).to(dtype)
    x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    whole = layer(x)
    pieces = []
    layer.register_forward_hook(lambda _, inputs, __: pieces.append(inputs[0].shape[1]))
    with torch.no_grad():
        got = float32_output(layer, x, 48)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, whole.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert sum(pieces) == tokens and max(pieces) <= (HEAD_TOKENS if dtype == torch.bfloat16 else tokens)
    got = float32_output(layer, x.requires_grad_(), 48)
    assert got.dtype == torch.float32 and got.requires_grad


@pytest.mark.parametrize("rows", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"])
def test_under_autocast_gradients_are_no_worse_than_torchs(rows, wanted):
    from mambacus.ops.linear.gpu import autocast_linear

    x, weight, _ = inputs(rows, 24, 40, torch.float32)
    grad = torch.randn(*rows, 24, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(function, dtype):
        leaves = [
            t.detach().to(dtype, copy=True).requires_grad_(wants) for t, wants in zip((x, weight), wanted, strict=True)
        ]
        y = function(*leaves)
        y.backward(grad.to(y.dtype))
        return {"y": y.detach()} | {
            name: leaf.grad for name, leaf, wants in zip("xw", leaves, wanted, strict=True) if wants
        }

    def torchs(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, weight)

    got = run(lambda x, weight: autocast_linear(x, weight, torch.bfloat16), torch.float32)
    same = run(torchs, torch.float32)
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in same.items()}
    assert_as_good_as(got, same, run(F.linear, torch.float64))


def test_under_autocast_a_frozen_weight_leaves_no_copy():
    from mambacus.ops.linear.gpu import autocast_linear

    x, weight, _ = inputs((7,), 24, 40, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        autocast_linear(x.requires_grad_(), weight, torch.bfloat16)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_on_a_cpu_autocast_is_torchs(monkeypatch):
    x, weight, _ = inputs((7,), 24, 40, torch.float32)
    with torch.autocast("cuda", torch.bfloat16, enabled=False):
        assert not interface._trains_on_gpu(x, weight.requires_grad_())
    monkeypatch.setattr(interface, "runs_eagerly_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert interface._trains_on_gpu(x, weight)
    assert not interface._trains_on_gpu(x, weight.detach())  # nothing to differentiate
    assert not interface._trains_on_gpu(x, weight.detach().bfloat16().requires_grad_())
    assert interface._trains_on_gpu(x.detach().requires_grad_(), weight.detach().bfloat16())  # frozen and cast before
    assert not interface._trains_on_gpu(x.detach().requires_grad_(), weight.detach().half())
    assert not interface._trains_on_gpu(x.double(), weight)
    assert linear(x, weight).dtype == torch.bfloat16
