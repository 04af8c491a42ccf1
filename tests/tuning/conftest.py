"""A model small enough to train in a test, and eight samples for it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mambacus.models import MambaConfig, MambaLM
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.tuning.data import Example, Sample, encode
from mambacus.tuning.trainer import Settings


@pytest.fixture
def make_model() -> Callable[..., MambaLM]:
    """Build a fresh two-layer model of a byte vocabulary, the same one every time."""

    def make(**changes: object) -> MambaLM:
        torch.manual_seed(1)
        sizes = {"d_model": 16, "n_layer": 2, "vocab_size": 257, "d_state": 4}
        model = MambaLM(MambaConfig(**(sizes | changes)))  # type: ignore[arg-type]
        with torch.no_grad():
            model.backbone.embeddings.weight.mul_(10)  # logits far from uniform, so that differences would show
        return model

    return make


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Eight sums of different lengths, answers trained on."""
    sums = [(2, 3), (40, 2), (7, 7), (10, 5), (100, 23), (9, 1), (30, 30), (6, 12)]
    examples = [Example(f"{a} plus {b}:", f" {a} + {b} = {a + b}") for a, b in sums]
    return encode(examples, byte_tokenizer(), max_length=64)[0]


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sums as JSONL, with solutions of two lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [
        {"question": f"{a} + {b}?", "answer": str(a + b), "solution": "so " * a} for a in (2, 13) for b in (3, 4, 15)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Float32 on the CPU at a rate that moves a small model."""
    return Settings(tmp_path, torch.device("cpu"), None, learning_rate=1e-2, save_every=2)


@pytest.fixture(scope="session", autouse=True)
def _short_collections() -> Iterator[None]:
    """Let the garbage collection that opens every ``Trainer.train`` skip what the imports left: it is half of a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out fsync: it guards against a power cut, which no test makes, and takes most of a short run."""
    monkeypatch.setattr("mambacus.tuning.checkpoints._force_to_disk", lambda path: None)
