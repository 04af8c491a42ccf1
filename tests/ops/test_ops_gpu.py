"""The kernels on a GPU, CUDA C++ and Triton: ``pytest -m gpu tests/ops``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from kernel_checks import (
    SCAN_NAMES,
    STEP_SHAPES,
    conv_inputs,
    document_ids,
    hold_conv,
    hold_cross_entropy,
    hold_likeliest,
    hold_linear_cross_entropy,
    hold_norm,
    hold_scan,
    hold_step,
    scan_inputs,
    step_weights,
)

from mambacus.models import MambaConfig, MambaLM
from mambacus.ops import (
    add_rms_norm,
    causal_conv1d,
    likeliest,
    linear,
    linear_cross_entropy,
    rms_norm,
    selective_scan,
    twins,
)
from mambacus.ops.causal_conv1d.reference import causal_conv1d_update_ref
from mambacus.ops.decode_step import decode_step
from mambacus.ops.decode_step import gpu as step_kernels
from mambacus.ops.linear import gpu as linear_gpu
from mambacus.ops.linear.dropout import drop
from mambacus.ops.linear.gpu import lora_linear
from mambacus.ops.selective_scan.reference import selective_state_update_ref
from mambacus.runtime.errors import UserError

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MAMBACUS_GPU_KERNELS", request.param)
    return request.param


def hold(
    inputs: dict[str, Any], forward_plan: Any = None, backward_plan: Any = None, keeps: bool = False, **options: Any
) -> None:
    """With ``keeps`` the backward pass is given y."""
    from mambacus.ops.selective_scan import gpu

    y = None

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        nonlocal y
        found = gpu.forward(*args, plan=forward_plan)
        y = found[0] if keeps else None
        return found

    def backward(*args: Any) -> tuple[torch.Tensor, ...]:
        return gpu.backward(*args, plan=backward_plan, y=y)

    hold_scan(forward, backward, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_with_documents(kernels: str, dtype: torch.dtype) -> None:
    seq_idx = document_ids(5, 150, "cuda")
    hold(scan_inputs((5, 150, 70, 16), dtype, seq_idx=seq_idx, device="cuda"), seq_idx=seq_idx)


def test_scan_whole_blocks(kernels: str) -> None:
    hold(scan_inputs((2, 150, 128, 16), device="cuda"))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 70, 33, 17),
        (2, 65, 40, 1),
        (1, 1, 64, 16),
        (1, 140, 40, 64),
        (1, 150, 40, 130),
        (1, 70, 20, 255),
        (1, 70, 20, 256),
    ],
)
def test_scan_odd_shapes(shape: tuple[int, int, int, int]) -> None:
    hold(scan_inputs(shape, device="cuda"))


@pytest.mark.parametrize("absent", [(name,) for name in OPTIONAL] + [OPTIONAL])
def test_scan_without_an_option(absent: tuple[str, ...]) -> None:
    hold(scan_inputs((2, 100, 64, 16), absent=absent, device="cuda"), with_final=len(absent) == 1)


def test_scan_without_softplus() -> None:
    inputs = scan_inputs((2, 50, 64, 16), absent=("delta_bias",), device="cuda")
    hold(inputs | {"delta": inputs["delta"].abs()}, softplus=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_backward_reads_y(dtype: torch.dtype) -> None:
    inputs = scan_inputs((2, 150, 128, 16), dtype, device="cuda")
    hold(inputs, keeps=True)
    inputs["z"][:, ::3, ::7] = 0  # gates that hide what was before them
    hold(inputs, keeps=True)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    "numbers",
    [
        (4, 16, 1, 64),
        (8, 16, 1, 128),
        (4, 8, 3, 64),
        (2, 32, 6, 192),
        (4, 16, 3, 192),
        (1, 8, 1, 192),
        (4, 16, 2, 192, 2),
        (4, 8, 3, 64, 2),
        (4, 16, 1, 192, 4),
    ],
    ids=str,
)
def test_scan_launches(numbers: tuple[int, ...], keeps: bool) -> None:
    from mambacus.ops.selective_scan.gpu_cuda import Plan

    seq_idx = document_ids(5, 150, "cuda")
    plan = Plan(*numbers)
    forward = dataclasses.replace(plan, sets=1)  # sets are the backward pass's alone, as short tiles are
    backward = plan if plan.tile <= 16 else None
    hold(scan_inputs((5, 150, 70, 16), seq_idx=seq_idx, device="cuda"), forward, backward, keeps, seq_idx=seq_idx)


def test_scan_triton_segments() -> None:
    from mambacus.ops.selective_scan.gpu_triton import Plan

    plan = Plan(64, 8, 64)
    hold(scan_inputs((2, 150, 70, 5), device="cuda"), plan, plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_with_documents(kernels: str, dtype: torch.dtype) -> None:
    from mambacus.ops.causal_conv1d import gpu

    seq_idx = document_ids(5, 150, "cuda")
    inputs = conv_inputs((5, 150, 70, 4), dtype, seq_idx=seq_idx, device="cuda")
    hold_conv(gpu.forward, gpu.backward, inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("shape", [(2, 150, 256, 4), (2, 2, 30, 4), (1, 40, 30, 3), (1, 9, 30, 1)])
def test_conv_shapes(kernels: str, shape: tuple[int, int, int, int]) -> None:
    from mambacus.ops.causal_conv1d import gpu

    hold_conv(gpu.forward, gpu.backward, conv_inputs(shape, device="cuda"))
    inputs = conv_inputs(shape, device="cuda", absent=("bias", "initial_state"))
    hold_conv(gpu.forward, gpu.backward, inputs, with_final=False, silu=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates(dtype: torch.dtype) -> None:
    from mambacus.ops.causal_conv1d import gpu as conv
    from mambacus.ops.selective_scan import gpu as scan

    inputs = scan_inputs((3, 1, 100, 17), dtype, device="cuda")
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    order = (one["initial_state"], *(one[k] for k in SCAN_NAMES[:7]))
    want = selective_state_update_ref(*order, delta_bias=one["delta_bias"])
    for a, b in zip(scan.update(*order, one["delta_bias"], True), want, strict=True):
        torch.testing.assert_close(a, b)
    state = order[0].clone()
    for a, b in zip(scan.update(state, *order[1:], one["delta_bias"], True, state), want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(state, want[1])
    conved = conv_inputs((3, 1, 100, 4), dtype, device="cuda")
    given = (conved["x"][:, 0], conved["initial_state"], conved["weight"], conved["bias"])
    want = causal_conv1d_update_ref(*given)
    for a, b in zip(conv.update(*given, True), want, strict=True):
        torch.testing.assert_close(a, b)
    state = given[1].clone()
    for a, b in zip(conv.update(given[0], state, *given[2:], True, state), want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(state, want[1])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 768), (5, 70), (9, 2560), (5000, 128)], ids=str)
@pytest.mark.parametrize("with_added", [True, False])
def test_norm(shape: tuple[int, int], with_added: bool, weight_dtype: torch.dtype) -> None:
    from mambacus.ops.rms_norm import gpu

    for dtype in (torch.float32, torch.bfloat16):
        hold_norm(gpu.forward, gpu.backward, shape, dtype, weight_dtype, torch.bfloat16, with_added=with_added,
                  device="cuda")  # fmt: skip


def test_norm_under_autograd_and_autocast() -> None:
    x, added, weight = (
        torch.randn(size, device="cuda", requires_grad=True) for size in ((3, 5, 64), (3, 5, 64), (64,))
    )
    y, total = add_rms_norm(x, added, weight, 1e-5)
    want_total = x + added
    want = torch.nn.functional.rms_norm(want_total, (64,), weight, 1e-5)
    for outputs in (([y, total], [want, want_total]), ([y], [want])):
        ones = [torch.randn_like(t) for t in outputs[0]]
        grads = [torch.autograd.grad(o, [x, added, weight], ones, retain_graph=True) for o in outputs]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cuda", torch.bfloat16):
        assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert rms_norm(x, weight, 1e-5).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    from mambacus.ops.cross_entropy.gpu import cross_entropy_

    for shape in ((20, 50280), (3, 70), (0, 8)):
        hold_cross_entropy(cross_entropy_, shape, dtype, "cuda")
    hold_linear_cross_entropy(linear_cross_entropy, dtype, "cuda")


@pytest.mark.parametrize("columns", [1, 70, 50280])
def test_likeliest(columns: int) -> None:
    hold_likeliest(likeliest, columns, "cuda")


def test_model_has_the_gradients_of_the_reference() -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=100, d_state=16), backend="reference").double()
    ids = torch.randint(100, (3, 75))
    seq_idx = document_ids(3, 75)
    model(ids, seq_idx, labels=ids).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.set_backend("auto")
    for autocast, bound in ((False, 2e-5), (True, 3e-2)):
        ours = model.float().cuda()
        ours.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = ours(ids.cuda(), seq_idx.cuda(), labels=ids.cuda(), loss_only=True).loss
        loss.backward()
        for name, parameter in ours.named_parameters():
            error = (parameter.grad.double().cpu() - want[name]).norm() / want[name].norm()
            assert error < bound, (name, autocast, error)


def test_a_trained_scan_reads_y() -> None:
    """Two sets of channels a block and y kept, as in training of large models, against sums over the states again."""
    from mambacus.ops.selective_scan import gpu, gpu_cuda

    inputs = scan_inputs((4, 300, 4096, 16), torch.bfloat16, absent=("initial_state",), device="cuda")
    plan = gpu_cuda.backward_plan((4, 300, 4096), 16, 64, torch.cuda.current_device(), reads_y=True)
    assert plan.sets == 2 or gpu_cuda._multiprocessors(torch.cuda.current_device()) != 132
    leaves = [inputs[name].detach().requires_grad_() for name in SCAN_NAMES[:8]]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for keeps in (True, False):
            patch.setattr(gpu, "keeps_output", lambda *_, keeps=keeps: keeps)
            y, _ = gpu.scan(*leaves, True, None, None, True)
            found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for name, a, b in zip(SCAN_NAMES[:8], *found, strict=True):
        assert (a - b).norm() <= 6e-3 * b.norm(), name


def test_public_functions_under_autograd() -> None:
    inputs = scan_inputs((2, 40, 64, 16), device="cuda")
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    order = [leaves[k] for k in SCAN_NAMES[:7]]
    options = {"delta_bias": leaves["delta_bias"], "initial_state": leaves["initial_state"]}
    grads = []
    for backend in ("auto", "reference"):
        y, state = selective_scan(*order, **options, backend=backend)
        mixed, _ = causal_conv1d(y, leaves["x"].new_ones(64, 4), None, backend=backend)
        grads.append(torch.autograd.grad(mixed.square().sum() + state.square().sum(), list(leaves.values())))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("batch", [1, 7, 8, 16, 23, 32, 33, 48, 64, 130])
def test_fused_step(batch: int) -> None:
    hold_step(functools.partial(decode_step, backend="cuda"), step_weights(device="cuda"), batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 768, "dt_rank": 48, "vocabulary": 50280, "n_layer": 3},
        {"d_model": 2048, "dt_rank": 128, "vocabulary": 1001, "n_layer": 3},
        *STEP_SHAPES,
    ],
    ids=str,
)
def test_fused_step_shapes(sizes: dict[str, Any]) -> None:
    for batch in (1, 5, 12, 30, 70):
        hold_step(functools.partial(decode_step, backend="cuda"), step_weights(**sizes, device="cuda"), batch)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("batch", [49, 64, 131])
def test_fused_step_of_many_rows(monkeypatch: pytest.MonkeyPatch, own: bool, batch: int) -> None:
    monkeypatch.setattr(step_kernels, "FUSED_ROWS", 512 if own else 0)
    hold_step(functools.partial(decode_step, backend="cuda"), step_weights(device="cuda"), batch)


def test_fused_step_says_what_it_cannot_take() -> None:
    with pytest.raises(UserError, match="they take 8, 16, 32, 64 states, got 4"):
        weights = step_weights(d_state=4, device="cuda")
        tokens = torch.zeros(1, dtype=torch.int64, device="cuda")
        decode_step(weights, tokens, tokens, tokens, tokens, backend="cuda")


@pytest.mark.parametrize("rows", [(50,), (3, 40)], ids=str)
def test_products_under_autocast(rows: tuple[int, ...]) -> None:
    """The weight's gradient is float32 and nearer to the truth than torch's, the others are torch's own."""
    torch.manual_seed(0)
    leaves = [torch.randn(*size, device="cuda") for size in ((*rows, 64), (96, 64))]
    grad = torch.randn(*rows, 96, device="cuda").bfloat16()
    found = {}
    for name, function in (("ours", linear), ("torch", torch.nn.functional.linear)):
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        with torch.autocast("cuda", torch.bfloat16):
            y = function(x, weight)
        y.backward(grad)
        found[name] = (y.detach(), x.grad, weight.grad)
    for ours, theirs in zip(found["ours"], found["torch"], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    truth = grad.double().flatten(0, -2).t() @ leaves[0].bfloat16().double().flatten(0, -2)
    errors = [(found[name][2].double() - truth).norm().item() for name in ("ours", "torch")]
    assert errors[0] < 1e-5 * truth.norm() < errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_takes_the_gradients_of_two_readers(kernels: str, dtype: torch.dtype) -> None:
    seq_idx = document_ids(5, 150, "cuda")
    inputs = conv_inputs((5, 150, 70, 4), dtype, seq_idx=seq_idx, absent=("initial_state",), device="cuda")
    names = ("x", "weight", "bias")
    ones = [torch.randn(5, 150, 70, device="cuda").to(dtype) for _ in range(2)]
    found = []
    for apart in (True, False):
        leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
        y, _ = causal_conv1d(*leaves, seq_idx=seq_idx)
        first, second = twins(y) if apart else (y, y)
        assert (first is not second) == apart
        found.append(torch.autograd.grad([first, second], leaves, ones))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * b.norm()


@pytest.mark.parametrize("shape", [(50, 64), (7, 13)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_that_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, seed = torch.randn(shape).to(dtype), torch.tensor([(5 << 40) + 11])
    assert torch.equal(drop(x.cuda(), seed.cuda(), 0.3).cpu(), drop(x, seed, 0.3))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loras_product(dropout: float) -> None:
    """The same seed on a GPU and a CPU: the product and the gradients are equal up to rounding."""
    torch.manual_seed(0)
    leaves = [torch.randn(*size) for size in ((50, 64), (96, 64), (8, 64), (96, 8))]
    grad, seed = torch.randn(50, 96).bfloat16(), torch.tensor([12345])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_gpu, "draw_seed", seed.to)
        for device in ("cuda", "cpu"):
            x, weight, down, up = (leaf.to(device, copy=True).requires_grad_() for leaf in leaves)
            y = lora_linear(x, weight.detach(), down, up, 2.5, dropout, torch.bfloat16)
            y.backward(grad.to(device))
            found.append([t.detach().cpu().double() for t in (y, x.grad, down.grad, up.grad)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm()
