"""A small model saved for transformers too, and the first rows of every evaluation file."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One random model in a folder, loaded by us and by transformers."""

    folder: Path
    model: Any
    tokenizer: Any
    reference: Any


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A byte-level model of two layers whose logits are spread enough for greedy choices to be clear."""
    from transformers import AutoModelForCausalLM

    from mambacus.models import load, save

    model, tokenizer = load("random:micro", seed=1)
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(5)
    folder = tmp_path_factory.mktemp("models") / "micro"
    save(model, folder, tokenizer)
    return Checkpoint(
        folder, model, tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    )


@pytest.fixture(scope="session")
def small_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the first 24 rows of every file: quick to read, real text."""
    folder = tmp_path_factory.mktemp("data")
    for source in [*data_dir.glob("zeroshot/*/*.jsonl"), *data_dir.glob("math/*/*.jsonl")]:
        target = folder / source.relative_to(data_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, encoding="utf-8") as file:
            target.write_text("".join(itertools.islice(file, 24)), encoding="utf-8")
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any attempt to connect or to look up a name fail the test."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"network used: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
