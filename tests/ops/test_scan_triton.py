"""The Triton kernels of the scan under Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_checks import SCAN_NAMES, hold_scan, scan_inputs

from mambacus.ops.selective_scan.reference import selective_state_update_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
case = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_cases_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="is the outer process")
def test_cases_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def hold(inputs: dict[str, Any], segment: int = 1 << 20, **options: Any) -> None:
    """Blocks of 16 channels, tiles of 4 tokens: the interpreter is slow."""
    from mambacus.ops.selective_scan import gpu_triton

    plan = gpu_triton.Plan(block=16, tile=4, segment=segment)
    forward = functools.partial(gpu_triton.forward, plan=plan)
    hold_scan(forward, functools.partial(gpu_triton.backward, plan=plan), inputs, twice=False, **options)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens, so that short sequences have several."""
    if INTERPRETED:
        from mambacus.ops.selective_scan import gpu_triton

        monkeypatch.setattr(gpu_triton, "chunk_length", lambda d_state: 8)


@case
@pytest.mark.parametrize(("segment", "d_inner", "d_state"), [(8, 12, 2), (1 << 20, 18, 3)], ids=["segments", "whole"])
def test_everything_given(segment: int, d_inner: int, d_state: int) -> None:
    seq_idx = torch.tensor([[-1, -1, 0, 0, 3, 3, 3, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 2, -1, -1]])
    hold(scan_inputs((2, 11, d_inner, d_state), seq_idx=seq_idx), segment, seq_idx=seq_idx)


@case
def test_no_option_given() -> None:
    hold(scan_inputs((1, 9, 5, 1), absent=("D", "z", "delta_bias", "initial_state")), with_final=False)


@case
def test_positive_step_without_softplus() -> None:
    inputs = scan_inputs((1, 5, 16, 2), absent=("delta_bias",))
    assert inputs["delta"] is not None
    hold(inputs | {"delta": inputs["delta"].abs()}, 8, softplus=False)


@case
def test_bfloat16() -> None:
    hold(scan_inputs((1, 6, 16, 2), torch.bfloat16))


@case
@pytest.mark.parametrize("segment", [8, 1 << 20])
def test_slow_decays_do_not_add_up_errors_of_the_exponential(monkeypatch: pytest.MonkeyPatch, segment: int) -> None:
    from mambacus.ops.selective_scan import gpu_triton_kernels as kernels

    exact = kernels.exp2
    monkeypatch.setattr(kernels, "exp2", lambda x: exact(x) * (1 - 2e-6))  # off as a GPU's is, ten times as far
    inputs = scan_inputs((1, 17, 5, 2), absent=("z", "delta_bias"))
    assert inputs["delta"] is not None and inputs["A"] is not None
    hold(inputs | {"delta": inputs["delta"].abs() / 8, "A": inputs["A"] / 32}, segment, softplus=False)


@case
def test_more_states_than_a_program_transposes() -> None:
    hold(scan_inputs((1, 4, 4, 70)))


@case
def test_nan_is_seen() -> None:
    from mambacus.ops.selective_scan import gpu_triton

    inputs = scan_inputs((1, 5, 16, 2))
    assert inputs["delta"] is not None
    inputs["delta"][0, 2, 3] = float("nan")
    given = (*(inputs[k] for k in SCAN_NAMES[:8]), True, None, None, False)
    y, _, _ = gpu_triton.forward(*given, plan=gpu_triton.Plan(16, 4, 8))
    assert y[0, :2].isfinite().all() and y[0, 2:, 3].isnan().all()


@case
def test_update() -> None:
    from mambacus.ops.selective_scan import gpu_triton

    inputs = scan_inputs((2, 1, 37, 5))
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    order = (one["initial_state"], *(one[k] for k in SCAN_NAMES[:7]))
    want = selective_state_update_ref(*order, delta_bias=one["delta_bias"])
    for out in (None, order[0].clone(), torch.empty(2, 5, 37).mT):
        for a, b in zip(gpu_triton.update(*order, one["delta_bias"], True, out), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    gpu_triton.update(*order, one["delta_bias"], True, order[0])
    torch.testing.assert_close(order[0], want[1], rtol=1e-5, atol=1e-5)


@case
def test_update_with_strided_states_and_without_softplus() -> None:
    from mambacus.ops.selective_scan import gpu_triton

    inputs = scan_inputs((2, 1, 37, 5))
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    one |= {"delta": one["delta"].abs(), "B": one["B"].mT.contiguous().mT, "C": torch.stack([one["C"]] * 3, -1)[..., 0]}
    assert (one["B"].stride(1), one["C"].stride(1)) == (2, 3)
    order = (one["initial_state"], *(one[k] for k in SCAN_NAMES[:7]))
    want = selective_state_update_ref(*order, delta_softplus=False)
    for a, b in zip(gpu_triton.update(*order, None, False), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
