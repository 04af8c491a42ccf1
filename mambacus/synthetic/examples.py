"""Rows of a task as tensors on a device, split so that no problem of the test is ever trained on.

A hash of a row's tokens decides which split the row belongs to, so the splits are disjoint however they are drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mambacus.runtime.errors import UserError
from mambacus.synthetic.tasks import IGNORE, Task, Tokens

SPLITS = ("test", "valid", "train")
_PARTS = 16  # of 16 parts one is the test, one the validation, the rest is for training
_CHUNK = 4096
_IDLE_ROUNDS = 40


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of one length, with the places where the answers are predicted. All int16, on one device.

    Attributes:
        input_ids: (rows, seqlen).
        places: (rows, answers' tokens), positions whose next token is scored, in order; 0 fills.
        targets: (rows, answers' tokens), the token after each place, `IGNORE` where ``places`` is filled.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Examples:
        """Return the examples on ``device``."""
        return Examples(self.input_ids.to(device), self.places.to(device), self.targets.to(device))


def split_of(ids: Tokens) -> npt.NDArray[np.int64]:
    """Return the place in `SPLITS` of each row of ``ids`` (rows, length), by a hash of all its tokens."""
    part = row_hash(ids) % np.uint64(_PARTS)
    return np.minimum(part, len(SPLITS) - 1).astype(np.int64)


def row_hash(ids: Tokens) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each row: a polynomial in an odd base, then the finaliser of splitmix64."""
    value = np.zeros(len(ids), np.uint64)
    for column in ids.T.astype(np.uint64):
        value = value * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def held_out(task: Task, split: str, rows: int, x: int, seed: int) -> Examples:
    """Return ``rows`` different problems of difficulty ``x`` of the split ``test`` or ``valid``.

    Raises:
        UserError: the task has not that many.
    """
    kept: list[tuple[Tokens, Tokens]] = []
    seen: set[int] = set()
    idle = 0
    for ids, labels in _drawn(task, split, x, seed, rows):
        fresh = []
        for row, key in enumerate(row_hash(ids).tolist()):
            if key not in seen:
                seen.add(key)
                fresh.append(row)
        kept.append((ids[fresh], labels[fresh]))
        if len(seen) >= rows:
            break
        idle = 0 if fresh else idle + 1
        if idle == _IDLE_ROUNDS:
            raise UserError(
                f"{task.x_name} {x}: expected {rows} different {split} problems, there are about {len(seen)}"
            )
    ids, labels = (np.concatenate(parts)[:rows] for parts in zip(*kept, strict=True))
    return examples_of(ids, labels)


def training_sets(task: Task, rows: Sequence[int], xs: Sequence[int], seed: int) -> tuple[Examples, ...]:
    """Return so many training problems of each difficulty of ``xs``: a set for each, whose rows need no fill."""
    return tuple(examples_of(*_some(task, "train", count, x, seed)) for x, count in zip(xs, rows, strict=True))


def mixed_rows(task: Task, split: str, rows: int, xs: Sequence[int], seed: int) -> Examples:
    """Return ``rows`` problems of a split, the difficulty of each drawn evenly from ``xs``, filled to one length."""
    seqlen = max(task.length(x) for x in xs)
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    counts = rng.multinomial(rows, np.full(len(xs), 1 / len(xs)))
    ids = np.full((rows, seqlen), task.pad, np.int16)
    labels = np.full((rows, seqlen), IGNORE, np.int16)
    end = 0
    for x, count in zip(xs, counts.tolist(), strict=True):
        begin, end = end, end + count
        ids[begin:end, : task.length(x)], labels[begin:end, : task.length(x)] = _some(task, split, count, x, seed)
    order = rng.permutation(rows)
    return examples_of(ids[order], labels[order])


def _some(task: Task, split: str, rows: int, x: int, seed: int) -> tuple[Tokens, Tokens]:
    """Return the first ``rows`` rows of difficulty ``x`` of a split, and their labels."""
    parts: list[tuple[Tokens, Tokens]] = []
    for part in _drawn(task, split, x, seed, rows):
        parts.append(part)
        if sum(len(ids) for ids, _ in parts) >= rows:
            break
    ids, labels = (np.concatenate(some)[:rows] for some in zip(*parts, strict=True))
    return ids, labels


def _drawn(task: Task, split: str, x: int, seed: int, rows: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield chunks of rows of difficulty ``x`` that belong to ``split``, without end; ``rows`` sizes the chunks."""
    wanted = SPLITS.index(split)
    rng = np.random.default_rng((seed, wanted, x))
    share = _PARTS if split != "train" else 1.25
    chunk = min(_CHUNK, 32 + int(rows * share))
    while True:
        ids, labels = task.draw(rng, chunk, x)
        mine = split_of(ids) == wanted
        yield ids[mine], labels[mine]


def examples_of(ids: Tokens, labels: Tokens) -> Examples:
    """Return rows and labels (rows, seqlen), as a task draws them, as `Examples` on the CPU."""
    if (labels[:, 0] != IGNORE).any():
        raise ValueError("the first token of a row has nothing before it that could predict it")
    scored = labels != IGNORE
    counts = scored.sum(axis=1)
    places = np.zeros((len(ids), int(counts.max(initial=0))), np.int16)
    targets = np.full_like(places, IGNORE)
    row, column = np.nonzero(scored)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    places[row, slot], targets[row, slot] = column - 1, labels[row, column]
    return Examples(torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(places), torch.from_numpy(targets))


def answers_right(examples: Examples, predicted: Tensor) -> tuple[int, int]:
    """Return how many answers are right, and how many there are.

    An answer is a run of consecutive places; it is right if all its tokens are. That is what greedy decoding gives: it
    finds the answer if and only if each token is the likeliest after the right ones.

    Args:
        examples: the rows.
        predicted: the likeliest token at each place, (rows, answers' tokens).
    """
    places, scored = examples.places.long(), examples.targets != IGNORE
    starts = scored.clone()
    starts[:, 1:] &= places[:, 1:] != places[:, :-1] + 1
    answer = starts.flatten().cumsum(0) - 1
    count = int(starts.sum())
    wrong = (scored & (predicted != examples.targets)).flatten()
    return count - len(answer[wrong].unique()), count
