"""The reference scan against a scalar loop in numpy, against finite differences, and against itself rearranged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import as_double, scan_inputs
from torch import Tensor

from mambacus.ops import selective_scan, selective_state_update


def scalar_loop(inputs: dict[str, Tensor], seq_idx: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Equations 2 and 3 of the paper, one number at a time."""
    a = {name: value.numpy() for name, value in inputs.items()}
    batch, seqlen, d_inner = a["x"].shape
    y, final = np.zeros_like(a["x"]), a["initial_state"].copy()
    for b in range(batch):
        for d in range(d_inner):
            h, document = final[b, d], None
            for t in range(seqlen):
                now = 0 if seq_idx is None else int(seq_idx[b, t])
                if now < 0:
                    continue
                if document is not None and now != document:
                    h[:] = 0.0
                document = now
                delta = np.log1p(np.exp(a["delta"][b, t, d] + a["delta_bias"][d]))
                for n in range(h.size):
                    h[n] = np.exp(delta * a["A"][d, n]) * h[n] + delta * a["B"][b, t, n] * a["x"][b, t, d]
                z = a["z"][b, t, d]
                y[b, t, d] = (a["C"][b, t] @ h + a["D"][d] * a["x"][b, t, d]) * z / (1 + np.exp(-z))
    return y, final


@pytest.mark.parametrize("ids", [None, [[-1, -1, 4, 4, 0, 0, 0], [2, 2, 2, 1, 2, -5, -5]]], ids=["plain", "documents"])
def test_equals_a_scalar_loop(ids):
    inputs = as_double(scan_inputs(2, 7, 3, 4))
    seq_idx = None if ids is None else torch.tensor(ids)
    want_y, want_final = scalar_loop(inputs, seq_idx)
    y, final_state = selective_scan(**inputs, seq_idx=seq_idx, backend="reference")
    np.testing.assert_allclose(y.numpy(), want_y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(final_state.numpy(), want_final, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("softplus", [True, False])
def test_gradients_equal_finite_differences(softplus):
    inputs = as_double(scan_inputs(2, 5, 3, 2))
    inputs["delta_bias"] += 0 if softplus else 6  # bare steps must be positive, or the states explode
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    seq_idx = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 3, 3, -1]])

    def op(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**arguments, delta_softplus=softplus, seq_idx=seq_idx, backend="reference")

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))


def test_update_is_a_scan_of_one_token():
    inputs = as_double(scan_inputs(2, 1, 3, 4))
    y, state = selective_scan(**inputs)
    one = {k: v.squeeze(1) if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y_one, state_one = selective_state_update(one.pop("initial_state"), **one)
    torch.testing.assert_close(y_one, y.squeeze(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state_one, state, rtol=1e-12, atol=1e-14)


def test_state_is_at_least_float32_and_float64_where_inputs_are():
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        inputs = scan_inputs(1, 3, 2, 2)
        inputs = {k: v.to(dtype) for k, v in inputs.items()}
        y, state = selective_scan(**inputs, backend="reference")
        assert y.dtype == dtype and state.dtype == state_dtype
