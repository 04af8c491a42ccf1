"""Answers found before, on disk: an interrupted evaluation goes on where it was.

A file holds the answers of one model: its name is a hash of everything besides the request that decides an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mambacus import __version__
from mambacus.inference import Completion, SamplingParams
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import check_writable, fingerprint


def model_fingerprint(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """Return a 16-digit hash of weights, tokenizer, this version and ``settings``.

    Every byte of every parameter and buffer counts, an adapter's too: no two models share a file by chance of name.

    Args:
        model: any module, on any device.
        tokenizer: a transformers tokenizer.
        settings: whatever else decides an answer, such as the longest input.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    vocabulary = sorted(tokenizer.get_vocab().items())
    return fingerprint([digest.hexdigest(), vocabulary, __version__, dict(settings)])


def cache_file(folder: Path, kind: str, model: str) -> Path:
    """Return the file for answers of one kind (a verb) by the model of fingerprint ``model``; the folder is made.

    Raises:
        UserError: the folder cannot be made or written.
    """
    check_writable(folder, "--cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {folder}: {error.strerror or error}") from None
    return folder / f"{kind}-{model}"


class CompletionCache:
    """Completions by prompt and sampling settings.

    Args:
        path: an SQLite file, made if absent; None keeps nothing.

    Attributes:
        hits: prompts answered from the file.
    """

    def __init__(self, path: Path | None) -> None:
        self.hits = 0
        self._rows: Any = {}
        if path is not None:
            from sqlitedict import SqliteDict

            self._rows = SqliteDict(str(path), autocommit=True)

    def get(self, prompt: Sequence[int] | str, params: SamplingParams) -> list[Completion] | None:
        """Return the completions kept for a prompt, or None."""
        found = self._rows.get(_key(prompt, params))
        if found is None:
            return None
        self.hits += 1
        return [Completion(*row) for row in found]

    def put(self, prompt: Sequence[int] | str, params: SamplingParams, completions: Sequence[Completion]) -> None:
        """Keep the completions of a prompt."""
        self._rows[_key(prompt, params)] = [(each.text, each.token_ids, each.finish_reason) for each in completions]

    def close(self) -> None:
        """Write what is still to be written."""
        if hasattr(self._rows, "close"):
            self._rows.close()


def _key(prompt: Sequence[int] | str, params: SamplingParams) -> str:
    text = prompt if isinstance(prompt, str) else list(prompt)
    return fingerprint([text, dataclasses.asdict(params)])
