"""The ops as torch sees them: schemas, fake tensors, autograd, compilation, and messages for wrong arguments."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from op_cases import conv_inputs, documents, scan_inputs

from mambacus.ops import (
    causal_conv1d,
    causal_conv1d_update,
    dispatch,
    linear,
    nvrtc,
    rms_norm,
    selective_scan,
    selective_state_update,
)
from mambacus.ops.dispatch import Choice, choose_backend, which_kernels
from mambacus.runtime.errors import UserError

OPS = torch.ops.mambacus


def scan_arguments(requires_grad: bool, **changes):
    inputs = scan_inputs(2, 40, 16, 4) | changes
    given = {k: v if v is None else v.detach().requires_grad_(requires_grad) for k, v in inputs.items()}
    initial_state = given.pop("initial_state")
    return (*given.values(), True, documents(2, 40), initial_state)


@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")], ids=["all", "none"])
def test_opcheck_scan(absent):
    arguments = scan_arguments(True, **dict.fromkeys(absent))
    torch.library.opcheck(OPS.selective_scan_forward.default, (*arguments, True))
    arguments = scan_arguments(False, **dict.fromkeys(absent))
    torch.library.opcheck(OPS.selective_scan_forward.default, (*arguments, False))
    y, final_state, chunk_states = OPS.selective_scan_forward(*arguments, True)
    torch.library.opcheck(OPS.selective_scan_backward.default, (y, final_state, *arguments, chunk_states))


@pytest.mark.parametrize("absent", [(), ("bias", "initial_state")], ids=["all", "none"])
def test_opcheck_conv(absent):
    inputs = conv_inputs(2, 40, 16, 4) | dict.fromkeys(absent)
    leaves = [inputs[k] if inputs[k] is None else inputs[k].requires_grad_() for k in inputs]
    torch.library.opcheck(OPS.causal_conv1d_forward.default, (*leaves[:3], True, documents(2, 40), leaves[3]))
    arguments = [None if t is None else t.detach() for t in leaves]
    arguments = (*arguments[:3], True, documents(2, 40), arguments[3])
    y, final_state = OPS.causal_conv1d_forward(*arguments)
    torch.library.opcheck(OPS.causal_conv1d_backward.default, (y, final_state, *arguments))


def test_opcheck_updates():
    a = {k: v.squeeze(1) if v.dim() == 3 and v.shape[1] == 1 else v for k, v in scan_inputs(2, 1, 16, 4).items()}
    rest = (a["D"], a["z"], a["delta_bias"], True)
    arguments = (a["initial_state"], a["x"], a["delta"], a["A"], a["B"], a["C"], *rest)
    torch.library.opcheck(OPS.selective_state_update.default, arguments)
    c = conv_inputs(2, 1, 16, 4)
    arguments = (c["x"].squeeze(1), c["initial_state"], c["weight"], c["bias"], True)
    torch.library.opcheck(OPS.causal_conv1d_update.default, arguments)


def test_scan_compiles_as_a_whole():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 40, 16, 4).items()}

    def loss(**kw):
        y, final_state = selective_scan(**kw)
        return y.square().sum() + final_state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(**inputs), list(inputs.values()))
    want = torch.autograd.grad(loss(**inputs), list(inputs.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_no_second_derivative_without_a_word():
    x = scan_inputs(1, 4, 8, 2)
    leaf = x["x"].detach().requires_grad_()
    y, _ = selective_scan(**x | {"x": leaf})
    (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(grad.sum(), leaf)


def scan(**changes):
    return lambda: selective_scan(**scan_inputs(2, 5, 8, 4) | changes)


def conv(**changes):
    return lambda: causal_conv1d(**conv_inputs(2, 5, 8, 4) | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (scan(x=torch.zeros(2, 5)), "x: expected shape (batch, seqlen >= 1, d_inner), got (2, 5)"),
        (scan(x=torch.zeros(2, 0, 8)), "x: expected shape (batch, seqlen >= 1, d_inner), got (2, 0, 8)"),
        (scan(delta=torch.zeros(2, 5, 7)), "delta: expected shape (2, 5, 8), got (2, 5, 7)"),
        (scan(A=torch.zeros(8)), "A: expected shape (d_inner, d_state), got (8,)"),
        (scan(B=torch.zeros(2, 5, 3)), "B: expected shape (2, 5, 4), got (2, 5, 3)"),
        (scan(D=torch.zeros(4)), "D: expected shape (8,), got (4,)"),
        (scan(initial_state=torch.zeros(2, 4, 8)), "initial_state: expected shape (2, 8, 4), got (2, 4, 8)"),
        (scan(seq_idx=torch.zeros(5)), "seq_idx: expected shape (2, 5), got (5,)"),
        (scan(seq_idx=torch.zeros(2, 5)), "seq_idx: expected integers, got torch.float32"),
        (conv(weight=torch.zeros(8, 1, 4)), "weight: expected shape (8, d_conv), got (8, 1, 4)"),
        (conv(bias=torch.zeros(4)), "bias: expected shape (8,), got (4,)"),
        (conv(activation="relu"), "activation: expected 'silu' or None, got 'relu'"),
        (conv(initial_state=torch.zeros(2, 8, 3)), "initial_state: expected shape (2, 8, 4), got (2, 8, 3)"),
        (
            lambda: causal_conv1d_update(torch.zeros(2, 8), torch.zeros(2, 8, 3), torch.zeros(8, 4)),
            "conv_state: expected shape (2, 8, 4), got (2, 8, 3)",
        ),
        (
            lambda: selective_state_update(
                torch.zeros(2, 8, 4), torch.zeros(2, 8), torch.zeros(2, 1, 8), torch.zeros(8, 4), torch.zeros(2, 4),
                torch.zeros(2, 4),
            ),
            "delta: expected shape (2, 8), got (2, 1, 8)",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        call()


CPU = torch.device("cpu")


def test_choice_of_backend():
    assert choose_backend("scan", CPU) == Choice("cpu", "cpu device")
    assert choose_backend("scan", CPU, "reference") == Choice("reference", "requested")
    assert choose_backend("scan", CPU, "cpu") == Choice("cpu", "requested")
    assert choose_backend("scan", CPU, dtype=torch.float64).name == "reference"


@pytest.mark.parametrize(
    ("requested", "dtype", "message"),
    [
        ("triton", None, "scan: backend 'triton' cannot run: it needs cuda tensors, got cpu"),
        ("cpu", torch.float64, "scan: backend 'cpu' cannot run: it computes in float32, got float64 input"),
        ("cqu", None, "scan: backend: expected one of auto, reference, cpu, triton, got 'cqu'; did you mean 'cpu'?"),
    ],
)
def test_a_named_backend_that_cannot_run_raises_with_the_reason(requested, dtype, message):
    with pytest.raises(UserError, match="^" + re.escape(message) + "$"):
        choose_backend("scan", CPU, requested, dtype=dtype)


def test_automatic_choice_of_the_reference_is_no_secret(monkeypatch):
    from mambacus.ops import dispatch

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    choose_backend.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="slow reference implementation: the package numba is not installed"):
            assert choose_backend("scan", CPU).name == "reference"
    finally:
        choose_backend.cache_clear()


def test_defaults_of_torch_do_not_reach_the_kernels():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 40, 16, 4).items()}
    conv = {k: v.requires_grad_() for k, v in conv_inputs(1, 40, 16, 4).items()}

    def results():
        found = []
        for op, given in ((selective_scan, inputs), (causal_conv1d, conv)):
            y, _ = op(**given)
            found += [y, *torch.autograd.grad(y.sum(), list(given.values()))]
        with torch.no_grad():
            found.append(rms_norm(inputs["x"], inputs["D"], 1e-5))
            found.append(linear(inputs["x"], inputs["A"].T.contiguous()))
        return found

    want = results()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tensors_on_another_device_are_refused():
    """A kernel would read their addresses."""
    scan, conv = scan_inputs(2, 3, 16, 4), conv_inputs(2, 3, 16, 4)
    initial = scan.pop("initial_state")
    for name in ("delta", "A", "B", "C", "D", "z", "delta_bias"):
        with pytest.raises(ValueError, match=f"{name}: expected on cpu as x, got meta"):
            selective_scan(**scan | {name: scan[name].to("meta")})
    with pytest.raises(ValueError, match="initial_state: expected on cpu"):
        selective_scan(**scan, initial_state=initial.to("meta"))
    with pytest.raises(ValueError, match="seq_idx: expected on cpu"):
        selective_scan(**scan, seq_idx=torch.zeros(2, 3, dtype=torch.int32, device="meta"))
    token = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in scan.items()}
    with pytest.raises(ValueError, match="state: expected on cpu"):
        selective_state_update(initial.to("meta"), **token)
    state = conv.pop("initial_state")
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=f"{name}: expected on cpu"):
            causal_conv1d(**conv | {name: conv[name].to("meta")})
    with pytest.raises(ValueError, match="conv_state: expected on cpu"):
        causal_conv1d_update(conv["x"][:, 0], state.to("meta"), conv["weight"])


def test_an_input_too_large_for_a_launch_is_named():
    program, struct = nvrtc.Program("", (), 0), nvrtc.struct("x", "far", "stride batch")
    nvrtc.Launch.of(program, "scan", (2**31 - 1, 65535, 1), 32, struct, {"far": 2**40, "stride": -(2**31), "batch": 1})
    with pytest.raises(ValueError, match="scan: too large an input: expected stride within 32 bits, got 2147483648"):
        nvrtc.Launch.of(program, "scan", (1, 1, 1), 32, struct, {"stride": 2**31})
    with pytest.raises(ValueError, match="conv: too large an input: expected at most 65535 blocks in y and z"):
        nvrtc.Launch.of(program, "conv", (1, 65536, 1), 32, struct, {})


CUDA = torch.device("cuda")


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    choose_backend.cache_clear()
    yield monkeypatch
    choose_backend.cache_clear()


def test_a_missing_triton_names_the_fix(without_triton):
    fix = re.escape("the package triton is not installed: pip install 'mambacus[gpu]'")
    without_triton.setattr(nvrtc, "unavailable", lambda: "no NVRTC")
    with pytest.warns(RuntimeWarning, match=fix):
        assert choose_backend("selective_scan", CUDA).name == "reference"
    with pytest.raises(UserError, match=fix):
        choose_backend("selective_scan", CUDA, "triton")


def test_updates_need_triton_where_the_scan_does_not(without_triton):
    without_triton.setattr(nvrtc, "unavailable", lambda: None)
    assert choose_backend("selective_scan", CUDA) == Choice("triton", "cuda device")
    for op in ("selective_state_update", "causal_conv1d_update"):
        with pytest.warns(RuntimeWarning, match=re.escape("pip install 'mambacus[gpu]'")):
            assert choose_backend(op, CUDA).name == "reference"


def test_a_record_warns_of_nothing_and_a_call_still_does(without_triton):
    without_triton.setattr(nvrtc, "unavailable", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert which_kernels(CUDA)["backends"]["selective_state_update"]["name"] == "reference"
    with pytest.warns(RuntimeWarning, match="slow reference"):
        choose_backend("selective_state_update", CUDA)


def test_rocm_is_said_to_be_untested(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    choose_backend.cache_clear()
    assert choose_backend("selective_scan", CUDA) == Choice("triton", "rocm device, untested")
    assert choose_backend("selective_scan", torch.device("cpu")).reason == "cpu device"
    choose_backend.cache_clear()


def test_a_record_says_which_kernels_run(monkeypatch):
    found = which_kernels(torch.device("cpu"))
    assert set(found["backends"]) == set(dispatch.OPS) and found["kernels"].startswith("numba")
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    choose_backend.cache_clear()
    assert which_kernels(CUDA)["kernels"].startswith("CUDA C++")
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "no driver")
    assert which_kernels(CUDA)["kernels"] == "Triton, since NVRTC: no driver"
    monkeypatch.setenv("MAMBACUS_GPU_KERNELS", "triton")
    assert which_kernels(CUDA)["kernels"] == "MAMBACUS_GPU_KERNELS=triton"
    choose_backend.cache_clear()
