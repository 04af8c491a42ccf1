"""The pre-training corpus of the embedded model: text and generated arithmetic as streams of tokens.

A stream is one long array of token ids in which every document starts with the end-of-text token, so that a model
learns both to stop and to start there. Three streams: ``text`` (books and children's stories), ``narratives``
(`mambacus.data.narratives`) and ``sums`` (`mambacus.data.arithmetic`). None holds a question with its answer, and
nothing here reads the held-out templates of `wordproblems` or an evaluation set.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mambacus.data.arithmetic import fact_sheet, statement
from mambacus.data.narratives import narrative
from mambacus.data.sources import read_rows, text_files
from mambacus.data.tokenizer import EOS_ID
from mambacus.runtime.outputs import fingerprint
from mambacus.runtime.records import write_json_atomic

STREAMS = ("text", "narratives", "sums")
VALID_STREAMS = ("books_valid", "stories_valid", "narratives_valid")
FORBIDDEN = ("Question:", "Answer:", "####")
_CHUNK_CHARS = 400_000
_DOCUMENTS_PER_TASK = 4_000
_VALID_NARRATIVES = 1_500
_STATEMENTS_PER_SHEET = 12
_SPACES = str.maketrans({"\u00a0": " ", "\u200b": None, "\ufeff": None})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the corpus holds; equal recipes give equal streams.

    Attributes:
        narratives: number of generated stories.
        sum_sheets: number of generated sheets of sums.
        seed: seed of all that is generated.
        max_text_chars: stop reading text after this many characters (for trials), 0 for all.
    """

    narratives: int
    sum_sheets: int
    seed: int
    max_text_chars: int = 0


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tokens of one part of the corpus.

    Attributes:
        tokens: uint16 (n,), each document led by the end-of-text token.
        documents: number of documents.
        text_bytes: UTF-8 length of the text, without the end-of-text tokens.
        left_out: paragraphs with question-answer marks, or arithmetic questions that no rule makes a statement.
    """

    tokens: np.ndarray
    documents: int
    text_bytes: int
    left_out: int = 0

    def about(self) -> dict[str, int]:
        """Return all but the tokens."""
        return {"documents": self.documents, "text_bytes": self.text_bytes, "left_out": self.left_out}


# Text


def clean(text: str) -> str:
    """Return ``text`` with plain spaces, and with the lines of a hard-wrapped book joined to paragraphs again."""
    text = text.translate(_SPACES).strip()
    blocks = text.split("\n\n")
    if len(blocks) < 50 or statistics.quantiles(map(len, blocks), n=20)[18] > 110:
        return text
    usual = statistics.median(map(len, blocks))
    paragraphs: list[str] = []
    open_line = False
    for block in blocks:
        if open_line:
            paragraphs[-1] += " " + block
        else:
            paragraphs.append(block)
        open_line = len(block) > 0.75 * usual  # a short line ends its paragraph
    return "\n\n".join(paragraphs)


def without_marks(text: str) -> tuple[str, int]:
    """Return ``text`` without the paragraphs that hold a question-answer mark, and how many they were."""
    if not any(mark in text for mark in FORBIDDEN):
        return text, 0
    paragraphs = text.split("\n\n")
    kept = [paragraph for paragraph in paragraphs if not any(mark in paragraph for mark in FORBIDDEN)]
    return "\n\n".join(kept), len(paragraphs) - len(kept)


def read_text(data_dir: Path | None, *names: str, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Yield the cleaned documents of text sources (keys of `sources.TEXT_FILES`).

    Args:
        data_dir: the folder of ``--data-dir``.
        names: the sources, in this order.
        left_out: counts, by source (key of `sources.TEXT_FILES`), the paragraphs that `without_marks` took out.

    Raises:
        UserError: a source is missing or unreadable.
    """
    for name in names:
        for path in text_files(data_dir, name):
            for row in read_rows(path):
                text, marked = without_marks(clean(row["text"]))
                if left_out is not None:
                    left_out[name] += marked
                yield text


def _chunks(documents: Iterable[str], limit: int) -> Iterator[list[tuple[bool, str]]]:
    """Group documents into tasks of `_CHUNK_CHARS` or more, long ones cut at paragraphs; True marks a start."""
    task: list[tuple[bool, str]] = []
    size = total = 0
    for document in documents:
        first = True
        rest = document
        while rest:
            cut = len(rest) if len(rest) <= _CHUNK_CHARS else rest.rfind("\n\n", 1, _CHUNK_CHARS)
            cut = cut if cut > 0 else _CHUNK_CHARS
            task.append((first, rest[:cut]))
            rest, first = rest[cut:], False
            size += cut
            if size >= _CHUNK_CHARS:
                yield task
                total += size
                task, size = [], 0
                if limit and total >= limit:
                    return
    if task:
        yield task


# Generated documents


def narratives(seed: int, shard: int, count: int) -> list[str]:
    """Return ``count`` stories of one shard; shards of one seed differ."""
    rng = random.Random(f"narratives/{seed}/{shard}")
    return [narrative(rng) for _ in range(count)]


def sum_sheets(seed: int, shard: int, count: int) -> list[str]:
    """Return ``count`` sheets of generated sums of one shard."""
    rng = random.Random(f"sums/{seed}/{shard}")
    return [fact_sheet(rng) for _ in range(count)]


def statement_sheets(data_dir: Path | None, left_out: Counter[str]) -> list[str]:
    """Return the arithmetic questions as sheets of statements; count in ``left_out`` those that no rule fits."""
    rows = [row for path in text_files(data_dir, "arithmetic_train") for row in read_rows(path)]
    told = [text for row in rows if (text := statement(row["question"], row["answer"])) is not None]
    left_out["arithmetic_train"] += len(rows) - len(told)
    return ["\n".join(told[at : at + _STATEMENTS_PER_SHEET]) for at in range(0, len(told), _STATEMENTS_PER_SHEET)]


# Tokens, in parallel

_GENERATORS: Mapping[str, Callable[[int, int, int], list[str]]] = {"narratives": narratives, "sums": sum_sheets}
_Part = tuple[bytes, int, int]  # uint16 token bytes, documents, text bytes
_tokenizer: Any = None


def _open_worker(tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = Tokenizer.from_file(tokenizer_file)


def _encode(pieces: list[tuple[bool, str]]) -> _Part:
    """Encode pieces of documents."""
    encodings = _tokenizer.encode_batch_fast([text for _, text in pieces], add_special_tokens=False)
    ids: list[int] = []
    for (first, _), encoding in zip(pieces, encodings, strict=True):
        if first:
            ids.append(EOS_ID)
        ids += encoding.ids
    text_bytes = sum(len(text.encode()) for _, text in pieces)
    return np.asarray(ids, dtype=np.uint16).tobytes(), sum(first for first, _ in pieces), text_bytes


def _generate(kind: str, seed: int, shard: int, count: int) -> _Part:
    return _encode([(True, text) for text in _GENERATORS[kind](seed, shard, count)])


def build_streams(
    data_dir: Path | None, tokenizer_file: Path, recipe: Recipe, cache: Path, workers: int
) -> dict[str, Stream]:
    """Return the training and validation streams, from ``cache`` if it holds those of this recipe and tokenizer.

    Args:
        data_dir: the folder of ``--data-dir``.
        tokenizer_file: a ``tokenizer.json``.
        recipe: what to read and generate.
        cache: folder for the token files; made if need be.
        workers: number of processes.

    Raises:
        UserError: a text source is missing or unreadable.
    """
    files = [*text_files(data_dir, "books_train"), *text_files(data_dir, "stories_train")]
    sizes = {path.name: path.stat().st_size for path in files}
    identity = [fingerprint(tokenizer_file.read_text(encoding="utf-8")), dataclasses.asdict(recipe), sizes]
    key = fingerprint(identity)
    cached = _read_cache(cache, key)
    if cached is not None:
        return cached
    with _pool(workers, tokenizer_file) as pool:
        parts, left_out = _submit(pool, data_dir, recipe)
        streams = {name: _collect(parts[name], left_out[name]) for name in parts}
    cache.mkdir(parents=True, exist_ok=True)
    for name, stream in streams.items():
        np.save(cache / f"{name}.npy", stream.tokens)
    write_json_atomic(cache / "streams.json", {"key": key, "streams": {n: s.about() for n, s in streams.items()}})
    return streams


def _pool(workers: int, tokenizer_file: Path) -> Executor:
    """Return processes that hold the tokenizer; one worker is a thread of this process."""
    start = (_open_worker, (str(tokenizer_file),))
    if workers == 1:
        return ThreadPoolExecutor(1, "corpus", *start)
    context = multiprocessing.get_context("spawn")  # forking would copy torch's threads and locks
    return ProcessPoolExecutor(workers, context, *start)


def _submit(
    pool: Executor, data_dir: Path | None, recipe: Recipe
) -> tuple[dict[str, list[Future[_Part]]], dict[str, int]]:
    """Hand out all work; return the pending parts of each stream in order, and what was left out of each."""
    left_out: Counter[str] = Counter()
    parts: dict[str, list[Future[_Part]]] = {name: [] for name in (*STREAMS, *VALID_STREAMS)}
    for kind, total in (("narratives", recipe.narratives), ("sums", recipe.sum_sheets)):
        for shard, start in enumerate(range(0, total, _DOCUMENTS_PER_TASK)):
            count = min(_DOCUMENTS_PER_TASK, total - start)
            parts[kind].append(pool.submit(_generate, kind, recipe.seed, shard, count))
    held_out = ("narratives", recipe.seed, -1, _VALID_NARRATIVES)  # a shard that training never asks for
    parts["narratives_valid"].append(pool.submit(_generate, *held_out))
    texts = {
        "sums": (statement_sheets(data_dir, left_out), 0),
        "text": (read_text(data_dir, "stories_train", "books_train", left_out=left_out), recipe.max_text_chars),
        "books_valid": (read_text(data_dir, "books_valid", left_out=left_out), recipe.max_text_chars),
        "stories_valid": (read_text(data_dir, "stories_valid", left_out=left_out), 0),
    }
    for name, (documents, limit) in texts.items():
        parts[name] += [pool.submit(_encode, task) for task in _chunks(documents, limit)]
    sources = {"text": ("stories_train", "books_train"), "sums": ("arithmetic_train",)}
    return parts, {name: sum(left_out[source] for source in sources.get(name, (name,))) for name in parts}


def _collect(parts: list[Future[_Part]], left_out: int) -> Stream:
    results = [part.result() for part in parts]
    tokens = np.frombuffer(b"".join(data for data, _, _ in results), dtype=np.uint16)
    documents, text_bytes = sum(count for _, count, _ in results), sum(size for _, _, size in results)
    return Stream(tokens, documents, text_bytes, left_out)


def _read_cache(cache: Path, key: str) -> dict[str, Stream] | None:
    """Return the cached streams, or None if there are none of this key."""
    index = cache / "streams.json"
    if not index.exists():
        return None
    about = json.loads(index.read_text(encoding="utf-8"))
    if about["key"] != key:
        return None
    return {name: Stream(np.load(cache / f"{name}.npy"), **values) for name, values in about["streams"].items()}


def tokenizer_sample(data_dir: Path | None, seed: int, max_chars: int = 12_000_000) -> Iterator[str]:
    """Yield the text the tokenizer is trained on: parts of every book, all stories, and generated documents.

    Args:
        data_dir: the folder of ``--data-dir``.
        seed: seed of the generated part.
        max_chars: about how much text of books to take.
    """
    yield from read_text(data_dir, "stories_train")
    yield from narratives(seed, 0, 20_000)
    yield from sum_sheets(seed, 0, 2_000)
    share = max_chars / 150_000_000
    for book in read_text(data_dir, "books_train"):
        yield book[: max(2_000, int(len(book) * share))]
