"""The Triton kernels of the convolution under Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_checks import conv_inputs, hold_conv

from mambacus.ops.causal_conv1d.reference import causal_conv1d_update_ref

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


@pytest.fixture(autouse=True)
def _small_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 channels, tiles of 8 tokens, backward programs of 16 tokens."""
    if INTERPRETED:
        from mambacus.ops.causal_conv1d import gpu_triton

        for name, value in (("_BLOCK", 16), ("_TILE", 8), ("_RUN", 16)):
            monkeypatch.setattr(gpu_triton, name, value)


def hold(inputs: dict[str, Any], **options: Any) -> None:
    from mambacus.ops.causal_conv1d import gpu_triton

    hold_conv(gpu_triton.forward, gpu_triton.backward, inputs, twice=False, **options)


@case
def test_documents_and_padding() -> None:
    seq_idx = torch.tensor(
        [[-1, 0, 0, 0, 3, 3, 0, 0, 0, 0], [5, 1, 1, 1, 1, 1, 1, 2, -1, -1], [-1] * 10, [-1] * 9 + [4]]
    )
    hold(conv_inputs((4, 10, 10, 4), seq_idx=seq_idx), seq_idx=seq_idx)


@case
def test_two_runs() -> None:
    hold(conv_inputs((1, 19, 18, 3)))


@case
def test_shorter_than_the_window() -> None:
    hold(conv_inputs((1, 1, 3, 2)))


@case
def test_no_option_given() -> None:
    hold(conv_inputs((1, 6, 10, 4), absent=("bias", "initial_state")), with_final=False, silu=False)


@case
def test_bfloat16() -> None:
    hold(conv_inputs((1, 6, 10, 2), torch.bfloat16))


@case
def test_update() -> None:
    from mambacus.ops.causal_conv1d import gpu_triton

    x, state, weight, bias = torch.randn(3, 20), torch.randn(3, 20, 4), torch.randn(20, 4), torch.randn(20)
    want = causal_conv1d_update_ref(x, state, weight, bias)
    for out in (None, state.clone(), torch.empty(3, 4, 20).mT):
        for a, b in zip(gpu_triton.update(x, state, weight, bias, True, out), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    gpu_triton.update(x, state, weight, bias, True, state)
    torch.testing.assert_close(state, want[1], rtol=1e-5, atol=1e-5)
