"""A small model whose greedy text wanders, and its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacus.models import MambaConfig, MambaLM
from mambacus.models.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def model() -> MambaLM:
    """Fresh parameters would echo the last token for ever."""
    torch.manual_seed(3)
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=257, dt_rank=4, d_state=8, tie_embeddings=False)
    model = MambaLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
