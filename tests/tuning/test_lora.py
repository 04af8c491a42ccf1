"""The training pass of LoRA equals PEFT's own, in output and every gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mambacus.tuning.lora import TrainedLoraLinear


def adapted(own: bool, bias: bool = True, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias))
    config = LoraConfig(target_modules=["0"], **({"r": 3, "lora_alpha": 5, "lora_dropout": 0.4} | settings))  # type: ignore[arg-type]
    if own:
        config._register_custom_module({nn.Linear: TrainedLoraLinear})
    wrapped = get_peft_model(model, config)
    assert any(isinstance(module, TrainedLoraLinear) for module in wrapped.modules()) == own
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped.train()


def outcome(model: nn.Module, shape: tuple[int, ...], autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (1, 1, 7)])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.0}, {"use_dora": True}, {"lora_bias": True}])
def test_training_equals_peft(shape: tuple[int, ...], settings: dict[str, object]) -> None:
    ours, theirs = (outcome(adapted(own, **settings), shape) for own in (True, False))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_is_pefts_own() -> None:
    ours, theirs = (adapted(own).eval() for own in (True, False))
    x = torch.randn(4, 7)
    assert torch.equal(ours(x), theirs(x))


def test_under_autocast_the_error_is_no_larger_than_pefts() -> None:
    exact = outcome(adapted(False), (64, 7))
    ours, theirs = (outcome(adapted(own), (64, 7), autocast=True) for own in (True, False))
    assert ours["y"].dtype == torch.bfloat16
    for name, expected in exact.items():
        error, allowed = ((side[name].float() - expected).abs().max() for side in (ours, theirs))
        assert error <= 2 * allowed + 1e-6, name


def test_without_bias() -> None:
    ours, theirs = (outcome(adapted(own, bias=False), (4, 7)) for own in (True, False))
    torch.testing.assert_close(ours["y"], theirs["y"])
