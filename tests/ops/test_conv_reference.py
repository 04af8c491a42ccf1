"""The reference convolution against a scalar loop in numpy, torch's own convolution, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_cases import as_double, conv_inputs

from mambacus.ops import causal_conv1d, causal_conv1d_update


def scalar_loop(inputs, ids, silu):
    """Collect the real inputs of each document in a list, and multiply its end with the taps."""
    a = {name: value.numpy() for name, value in inputs.items()}
    batch, seqlen, d_inner = a["x"].shape
    d_conv = a["weight"].shape[1]
    y, final = np.zeros_like(a["x"]), np.zeros_like(a["initial_state"])
    for b in range(batch):
        for d in range(d_inner):
            seen, document = list(a["initial_state"][b, d]), None
            for t in range(seqlen):
                now = int(ids[b, t])
                if now < 0:
                    continue
                if document is not None and now != document:
                    seen = [0.0] * d_conv
                document = now
                seen.append(a["x"][b, t, d])
                total = a["bias"][d] + sum(w * v for w, v in zip(a["weight"][d], seen[-d_conv:], strict=True))
                y[b, t, d] = total / (1 + np.exp(-total)) if silu else total
            final[b, d] = seen[-d_conv:]
    return y, final


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_equals_a_scalar_loop(d_conv, silu):
    inputs = as_double(conv_inputs(3, 7, 3, d_conv))
    ids = torch.tensor([[-1, -1, 4, 4, 0, 0, 0], [2, 2, 2, 1, 2, -5, -5], [-1, -1, -1, -1, -1, -1, 0]])
    activation = "silu" if silu else None
    y, final_state = causal_conv1d(**inputs, activation=activation, seq_idx=ids, backend="reference")
    want_y, want_final = scalar_loop(inputs, ids, silu)
    np.testing.assert_allclose(y.numpy(), want_y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(final_state.numpy(), want_final, rtol=1e-12, atol=1e-14)


def test_equals_torch():
    inputs = as_double(conv_inputs(2, 9, 3, 4)) | {"initial_state": None}
    y, final_state = causal_conv1d(**inputs, activation=None)
    x = inputs["x"].transpose(1, 2)
    want = F.conv1d(x, inputs["weight"].unsqueeze(1), inputs["bias"], padding=3, groups=3)[..., :9]
    torch.testing.assert_close(y, want.transpose(1, 2), rtol=1e-12, atol=1e-14)
    assert torch.equal(final_state, x[..., -4:])


def test_gradients_equal_finite_differences():
    inputs = {k: v.requires_grad_() for k, v in as_double(conv_inputs(2, 5, 3, 3)).items()}
    seq_idx = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 3, 3, -1]])

    def op(*tensors):
        return causal_conv1d(**dict(zip(inputs, tensors, strict=True)), seq_idx=seq_idx, backend="reference")

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))


def test_update_is_a_convolution_of_one_token():
    inputs = as_double(conv_inputs(2, 1, 3, 4))
    y, state = causal_conv1d(**inputs)
    y_one, state_one = causal_conv1d_update(
        inputs["x"].squeeze(1), inputs["initial_state"], inputs["weight"], inputs["bias"]
    )
    assert torch.equal(y_one, y.squeeze(1)) and torch.equal(state_one, state)
