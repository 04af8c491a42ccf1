"""The float64 scan that timed calls are held to equals the reference, and its distances notice a wrong number."""

from __future__ import annotations

import pytest
import torch

from mambacus.measuring import exact
from mambacus.measuring.exact import BLOCK, GRADIENTS, linear_recurrence, scan_errors
from mambacus.measuring.scan import scan_inputs
from mambacus.ops import selective_scan

CPU = torch.device("cpu")


def results(shape):
    """Return inputs, grad_y, outputs and gradients of the reference, all in float64."""
    inputs = [tensor.double() for tensor in scan_inputs(shape, CPU, torch.float32)]
    grad_y = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    y, state = selective_scan(*leaves[:7], delta_bias=leaves[7], backend="reference")
    grads = torch.autograd.grad(y, leaves, grad_y)
    inputs = [tensor.detach() for tensor in inputs]
    return inputs, grad_y, {"y": y.detach(), "final_state": state.detach()}, dict(zip(GRADIENTS, grads, strict=True))


@pytest.mark.parametrize("seqlen", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK - 1, BLOCK**2 + 7])
def test_a_recurrence_is_that_of_a_loop(seqlen):
    generator = torch.Generator().manual_seed(seqlen)
    decay, drive = (torch.rand(seqlen, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    before = decay.clone(), drive.clone()
    h, expected = torch.zeros(3, dtype=torch.float64), []
    for a, b in zip(decay, drive, strict=True):
        h = a * h + b
        expected.append(h)
    torch.testing.assert_close(linear_recurrence(decay, drive), torch.stack(expected), rtol=1e-12, atol=0)
    assert torch.equal(decay, before[0]) and torch.equal(drive, before[1])  # inputs stay as they were


@pytest.mark.parametrize("shape", [(2, 5, 1), (1, 3, BLOCK), (2, 7, 2 * BLOCK + 3)])
@pytest.mark.parametrize("numbers", [16, 2**22])  # one channel at a time, all at once
def test_the_reference_has_no_error(shape, numbers, monkeypatch):
    monkeypatch.setitem(exact.NUMBERS, "cpu", numbers)
    found = scan_errors(*results(shape))
    assert found.keys() == {"y", "final_state", *GRADIENTS}
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("name", ["y", "final_state", *GRADIENTS])
def test_one_wrong_number_is_an_error_of_its_tensor_alone(name, monkeypatch):
    monkeypatch.setitem(exact.NUMBERS, "cpu", 2 * 16 * 70)  # two channels of seventy tokens: three parts and a rest
    inputs, grad_y, outputs, grads = results((2, 7, 70))
    where = outputs if name in outputs else grads
    where[name] = where[name].clone()
    where[name].view(-1)[-1] += 1e-3 * where[name].norm()
    found = scan_errors(inputs, grad_y, outputs, grads)
    assert found.pop(name) == pytest.approx(1e-3, rel=1e-6)
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("name", ["y", "x", "B"])
def test_a_result_that_is_no_number_is_infinitely_wrong(name):
    inputs, grad_y, outputs, grads = results((1, 3, 5))
    where = outputs if name in outputs else grads
    where[name] = where[name].clone()
    where[name].view(-1)[0] = torch.nan
    found = scan_errors(inputs, grad_y, outputs, grads)
    assert max(found.values()) == found.pop(name) == torch.inf and max(found.values()) < 1e-12
