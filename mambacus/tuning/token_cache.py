"""Tokenised samples on disk, named after their content: read by memory map, so a set may be larger than memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from mambacus.runtime.errors import UserError
from mambacus.tuning.data import LeftOut, Sample
from mambacus.tuning.schemas import Example

VERSION = 2  # of the files; a change makes old ones unfindable
_TOKENS, _INDEX, _NOTES = "tokens.int32", "index.npy", "notes.json"


class StoredSamples(Sequence[Sample]):
    """The samples of one folder; only what is asked for is read.

    Args:
        folder: written by `store`.
    """

    def __init__(self, folder: Path) -> None:
        self._index = np.load(folder / _INDEX)  # int64 (n + 1, 2): first token, trained_from
        total = int(self._index[-1, 0])
        self._tokens = np.memmap(folder / _TOKENS, dtype=np.int32, mode="r", shape=(total,))

    def __len__(self) -> int:
        return len(self._index) - 1

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        start, trained_from = self._index[place]
        return Sample(np.array(self._tokens[start : self._index[place + 1, 0]]), int(trained_from))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, without reading them."""
        lengths: list[int] = np.diff(self._index[:, 0]).tolist()
        return lengths


def content_key(examples: Iterable[Example], tokenizer: Any, settings: Any, left_out: LeftOut) -> str:
    """Return a name for what `store` would write.

    Args:
        examples: consumed; each counts with the place that it is from, which listings name.
        tokenizer: as `encode_stream` takes it.
        settings: JSON values that tokens depend on.
        left_out: what the examples' conversion has left out once they are through.
    """
    content = hashlib.sha256()
    for example in examples:
        content.update(f"{example!r} {example.where!r}".encode("utf-8", "surrogatepass"))
    content.update(repr((sorted(left_out.dropped.items()), left_out.listed)).encode("utf-8", "surrogatepass"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content.update((backend.to_str() if backend is not None else repr(tokenizer)).encode())
    content.update(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    return content.hexdigest()[:32]


def find(cache: Path, key: str) -> tuple[StoredSamples, dict[str, Any]] | None:
    """Return the samples called ``key`` and the notes beside them, None if there are none."""
    folder = cache / key
    try:
        notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
        return StoredSamples(folder), notes
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--cache: {folder} is broken ({error}); remove it") from None


def store(cache: Path, key: str, samples: Iterable[Sample], notes: dict[str, Any]) -> StoredSamples:
    """Write samples as they come, whole or not at all, and return them for reading.

    Args:
        cache: the folder of all cached sets; made if need be.
        key: from `content_key`.
        samples: consumed once; memory holds their index alone.
        notes: JSON values, read after the last sample.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    staging = cache / f".{key}.{os.getpid()}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        index, written = [], 0
        with open(staging / _TOKENS, "wb") as file:
            for sample in samples:
                index.append((written, sample.trained_from))
                file.write(np.ascontiguousarray(sample.ids, dtype=np.int32).data)
                written += len(sample)
        np.save(staging / _INDEX, np.array([*index, (written, 0)], dtype=np.int64))
        (staging / _NOTES).write_text(json.dumps(notes), encoding="utf-8")
        if (cache / key).exists():  # another process was quicker
            shutil.rmtree(staging)
        else:
            os.replace(staging, cache / key)
    except OSError as error:
        raise UserError(f"--cache {cache}: cannot write ({error.strerror or error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return StoredSamples(cache / key)
