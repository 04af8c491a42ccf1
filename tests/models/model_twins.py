"""Small random models, their twins in transformers, and how the two are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambacus.models import MambaConfig, MambaLM

SHAPE: dict[str, Any] = {"d_model": 24, "n_layer": 3, "vocab_size": 61, "d_state": 5, "dt_rank": 3}


def small_model(seed: int = 0, backend: str = "auto", **changes: Any) -> MambaLM:
    """Return a model whose parameters are all generic: no bias is zero, no gain is one."""
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(**{**SHAPE, **changes}), backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def transformers_twin(model: MambaLM) -> nn.Module:
    """Return transformers' model with the same configuration and weights."""
    import transformers

    keys = model.config.to_hf("float32")
    for key in ("architectures", "model_type", "intermediate_size"):
        del keys[key]
    twin = transformers.MambaForCausalLM(transformers.MambaConfig(**keys))
    twin.load_state_dict(model.state_dict())
    return twin


def tokens(*shape: int, seed: int = 1, vocabulary: int = SHAPE["vocab_size"]) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter and forget them."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
        parameter.grad = None
    return found


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        difference, size = (got[name] - gradient).norm().item(), gradient.norm().item()
        assert difference <= tolerance * size, f"{name}: gradient of norm {size:.1e} is off by {difference:.1e}"
