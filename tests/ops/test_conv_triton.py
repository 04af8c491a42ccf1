"""The Triton kernels of the convolution under Triton's interpreter on the CPU, against the reference in float64.

The interpreter must be chosen before triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

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
        from mambacus.ops.causal_conv1d import gpu

        for name, value in (("_BLOCK", 16), ("_TILE", 8), ("_RUN", 16)):
            monkeypatch.setattr(gpu, name, value)


def assert_equals_reference(
    batch: int, seqlen: int, d_inner: int, width: int, *, seq_idx: Tensor | None = None, bias: bool = True,
    initial: bool = True, with_final: bool = True, silu: bool = True, dtype: torch.dtype = torch.float32,
    bound: float = 1e-6,
) -> None:  # fmt: skip
    """Hold y, final_state and every gradient to the float64 reference; empty tensors start as NaN."""
    from mambacus.ops.causal_conv1d import gpu
    from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref

    torch.manual_seed(seqlen)
    x = torch.randn(batch, seqlen, 2 * d_inner).to(dtype)[..., :d_inner]  # rows are not contiguous, as in the model
    inputs = {
        "x": x, "weight": torch.randn(d_inner, width), "bias": torch.randn(d_inner) if bias else None,
        "initial_state": torch.randn(batch, d_inner, width).to(dtype) if initial else None,
    }  # fmt: skip
    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    y, final = causal_conv1d_ref(
        leaves["x"], leaves["weight"], leaves["bias"], activation="silu" if silu else None, seq_idx=seq_idx,
        initial_state=leaves["initial_state"],
    )  # fmt: skip
    grad_y, grad_final = torch.randn(x.shape).to(dtype), torch.randn(final.shape).to(dtype)
    kept = [k for k, v in leaves.items() if v is not None]
    outputs = [y, final] if with_final else [y]
    wanted = torch.autograd.grad(
        outputs, [leaves[k] for k in kept], [grad_y.double(), grad_final.double()][: len(outputs)]
    )

    given = (x, inputs["weight"], inputs["bias"], silu, seq_idx, inputs["initial_state"])
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        got_y, got_final = gpu.forward(*given)
        grads = dict(zip(inputs, gpu.backward(grad_y, grad_final if with_final else None, *given), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = {"y": (got_y, y), "final_state": (got_final, final)}
    pairs |= {k: (grads[k], want) for k, want in zip(kept, wanted, strict=True)}
    for name, (got, want) in pairs.items():
        error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        assert got.shape == want.shape and error < bound, (name, error)
    assert all(grads[k].dtype == inputs[k].dtype for k in kept)


@case
def test_one_document() -> None:
    assert_equals_reference(2, 19, 18, 4)


@case
def test_documents_and_padding() -> None:
    seq_idx = torch.tensor(
        [[-1, -1, -1, 0, 0, 0, 0, 3, 3, 0, 0, 0], [5, 5, 1, 1, 1, 1, 1, 1, 1, 2, -1, -1], [-1] * 12, [-1] * 11 + [4]]
    )
    assert_equals_reference(4, 12, 10, 4, seq_idx=seq_idx)
    assert_equals_reference(4, 12, 10, 3, seq_idx=seq_idx, initial=False)


@case
def test_shorter_than_the_window() -> None:
    assert_equals_reference(2, 2, 10, 5, seq_idx=torch.tensor([[-1, 2], [0, 1]]))
    assert_equals_reference(1, 1, 3, 1)


@case
def test_no_option_given() -> None:
    assert_equals_reference(1, 6, 10, 4, bias=False, initial=False, with_final=False, silu=False)


@case
def test_bfloat16() -> None:
    assert_equals_reference(1, 9, 10, 4, dtype=torch.bfloat16, bound=6e-3)


@case
def test_update() -> None:
    from mambacus.ops.causal_conv1d import gpu
    from mambacus.ops.causal_conv1d.reference import causal_conv1d_update_ref

    x, state, weight, bias = torch.randn(3, 20), torch.randn(3, 20, 4), torch.randn(20, 4), torch.randn(20)
    want = causal_conv1d_update_ref(x, state, weight, bias)
    for a, b in zip(gpu.update(x, state, weight, bias, True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
