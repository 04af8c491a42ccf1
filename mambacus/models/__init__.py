"""Mamba models: configuration, the model itself, its state, and its formats on disk."""

from mambacus.models.checkpoint import save
from mambacus.models.config import MambaConfig
from mambacus.models.mamba import MambaLM, MambaOutput
from mambacus.models.registry import load, load_config, load_tokenizer, model_type
from mambacus.models.state import MambaState

__all__ = [
    "MambaConfig",
    "MambaLM",
    "MambaOutput",
    "MambaState",
    "load",
    "load_config",
    "load_tokenizer",
    "model_type",
    "save",
]
