"""The Triton kernels of the scan under Triton's interpreter on the CPU, against the reference in float64.

The interpreter must be chosen before triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
case = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_cases_under_the_interpreter")
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.mark.skipif(INTERPRETED, reason="is the outer process")
def test_cases_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def random_inputs(
    batch: int, seqlen: int, d_inner: int, d_state: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    """x, z and B, C are halves of one tensor each: rows are not contiguous, as in the model."""
    torch.manual_seed(seqlen)
    x, z = torch.randn(batch, seqlen, 2 * d_inner).to(dtype).chunk(2, dim=-1)
    B, C = torch.randn(batch, seqlen, 2 * d_state).to(dtype).chunk(2, dim=-1)
    return {
        "x": x, "delta": torch.randn(batch, seqlen, d_inner).to(dtype), "A": -2 * torch.rand(d_inner, d_state), "B": B,
        "C": C, "D": torch.randn(d_inner), "z": z, "delta_bias": torch.randn(d_inner) - 1,
        "initial_state": torch.randn(batch, d_inner, d_state),
    }  # fmt: skip


def assert_equals_reference(
    inputs: dict[str, Tensor | None], *, seq_idx: Tensor | None = None, softplus: bool = True, segment: int = 1 << 20,
    with_final: bool = True, bound: float = 1e-6,
) -> None:  # fmt: skip
    """Hold y, final_state and every gradient to the float64 reference; empty tensors start as NaN."""
    from mambacus.ops.selective_scan import gpu
    from mambacus.ops.selective_scan.reference import selective_scan_ref

    x, A = inputs["x"], inputs["A"]
    assert x is not None and A is not None
    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    truth: dict[str, Any] = {}
    truth["y"], truth["final_state"] = selective_scan_ref(
        *(leaves[k] for k in NAMES[:7]), delta_bias=leaves["delta_bias"], delta_softplus=softplus, seq_idx=seq_idx,
        initial_state=leaves["initial_state"],
    )  # fmt: skip
    grad_y = torch.randn(x.shape).to(x.dtype)
    grad_final = torch.randn(x.shape[0], *A.shape) if with_final else None
    outputs, output_grads = [truth["y"]], [grad_y.double()]
    if grad_final is not None:
        outputs.append(truth["final_state"])
        output_grads.append(grad_final.double())
    kept = [k for k in NAMES if leaves[k] is not None]
    truth |= dict(zip(kept, torch.autograd.grad(outputs, [leaves[k] for k in kept], output_grads), strict=True))

    given = tuple(inputs[k] for k in NAMES[:8])
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        got: dict[str, Tensor] = {}
        got["y"], got["final_state"], chunks = gpu.forward(
            *given, softplus, seq_idx, inputs["initial_state"], True, plan=gpu.Plan(16, 4, segment)
        )
        grads = gpu.backward(
            grad_y, grad_final, *given, softplus, seq_idx, inputs["initial_state"], chunks,
            plan=gpu.Plan(16, 4, segment),
        )  # fmt: skip
        got |= dict(zip(NAMES, grads, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, want in truth.items():
        error = ((got[name].double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        assert got[name].shape == want.shape, name
        assert error < bound, (name, error)  # false for NaN
    for name in NAMES:
        if inputs[name] is None:
            assert got[name].numel() == 0, name
        else:
            assert got[name].dtype == inputs[name].dtype, name


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens, so that short sequences have several."""
    if INTERPRETED:
        from mambacus.ops.selective_scan import gpu

        monkeypatch.setattr(gpu, "chunk_length", lambda d_state: 8)


@case
@pytest.mark.parametrize(("segment", "d_inner", "d_state"), [(8, 12, 2), (1 << 20, 18, 3)], ids=["segments", "whole"])
def test_everything_given(segment: int, d_inner: int, d_state: int) -> None:
    seq_idx = torch.tensor([[-1, -1, 0, 0, 3, 3, 3, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 2, -1, -1]])
    assert_equals_reference(random_inputs(2, 11, d_inner, d_state), seq_idx=seq_idx, segment=segment)


@case
def test_no_option_given() -> None:
    inputs = random_inputs(1, 9, 5, 1)
    assert_equals_reference(inputs | dict.fromkeys(("D", "z", "delta_bias", "initial_state")), with_final=False)


@case
def test_positive_step_without_softplus() -> None:
    inputs = random_inputs(1, 5, 16, 2)
    assert inputs["delta"] is not None
    assert_equals_reference(inputs | {"delta": inputs["delta"].abs(), "delta_bias": None}, softplus=False, segment=8)


@case
def test_bfloat16() -> None:
    assert_equals_reference(random_inputs(1, 6, 16, 2, torch.bfloat16), bound=6e-3)


@case
def test_nan_is_seen() -> None:
    from mambacus.ops.selective_scan import gpu

    inputs = random_inputs(1, 5, 16, 2)
    assert inputs["delta"] is not None
    inputs["delta"][0, 2, 3] = float("nan")
    given = tuple(inputs[k] for k in NAMES[:8])
    y, _, _ = gpu.forward(*given, True, None, None, False, plan=gpu.Plan(16, 4, 8))
    assert y[0, :2].isfinite().all() and y[0, 2:, 3].isnan().all()


@case
def test_update() -> None:
    from mambacus.ops.selective_scan import gpu
    from mambacus.ops.selective_scan.reference import selective_state_update_ref

    i = random_inputs(2, 1, 37, 5)
    one = {k: v if v is None or k not in ("x", "delta", "B", "C", "z") else v[:, 0] for k, v in i.items()}
    order = (one["initial_state"], *(one[k] for k in NAMES[:7]))
    want = selective_state_update_ref(*order, delta_bias=one["delta_bias"])
    for a, b in zip(gpu.update(*order, one["delta_bias"], True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
