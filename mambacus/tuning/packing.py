"""Packing: which samples make one optimiser step, which share a row, and the tensors of a row.

A step is a fixed number of samples, whatever their lengths, so the mathematics of a run does not depend on how they are
packed: rows only decide how few padding tokens are computed. ``seq_idx`` keeps the samples of a row apart.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch

from mambacus.tuning.data import IGNORED, Sample

PADDING = -1
PADDING_VALUES = {"input_ids": 0, "labels": IGNORED, "seq_idx": PADDING}
Rows = list[list[int]]  # sample indices of each row


def pack(lengths: Sequence[int], capacity: int, *, min_rows: int = 1) -> Rows:
    """Share samples out to rows of nearly equal length, none above ``capacity``.

    The longest sample left goes to the emptiest row, then swaps between the longest and the shortest row level them
    out; equal rows matter because a batch is padded to its longest.
    Deterministic. A sample longer than ``capacity`` gets a row of its own, and ``capacity`` 0 gives each its own row.

    Args:
        lengths: tokens of each sample.
        capacity: tokens a row may hold.
        min_rows: make at least this many rows (as far as there are samples).

    Returns:
        For each row the indices of its samples; longest row first.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    n_rows = math.ceil(sum(lengths) / capacity) if capacity else len(lengths)
    n_rows = min(max(n_rows, min_rows), len(lengths))
    while (rows := _share_out(order, lengths, capacity, n_rows)) is None:
        n_rows += 1
    while _level(rows, lengths):
        pass
    return sorted(rows, key=lambda row: (-sum(lengths[index] for index in row), row[0]))


def _share_out(order: Sequence[int], lengths: Sequence[int], capacity: int, n_rows: int) -> Rows | None:
    """Return the rows, or None if ``n_rows`` of them cannot hold the samples."""
    rows: Rows = [[] for _ in range(n_rows)]
    heap = [(0, row) for row in range(n_rows)]
    for index in order:
        filled, row = heap[0]
        if filled and filled + lengths[index] > capacity:
            return None
        rows[row].append(index)
        heapq.heapreplace(heap, (filled + lengths[index], row))
    return rows


def _level(rows: Rows, lengths: Sequence[int]) -> bool:
    """Swap a sample of the longest row for one (or none) of the shortest if that brings them closer; return whether."""
    totals = [sum(lengths[index] for index in row) for row in rows]
    longest, shortest = totals.index(max(totals)), totals.index(min(totals))
    gap = totals[longest] - totals[shortest]
    gains = [
        (abs(gap - 2 * moved), position, other)
        for position, index in enumerate(rows[longest])
        for other, partner in [(-1, None), *enumerate(rows[shortest])]
        if 0 < (moved := lengths[index] - (lengths[partner] if partner is not None else 0)) < gap
    ]
    if not gains:
        return False
    _, position, other = min(gains)
    rows[shortest].append(rows[longest].pop(position))
    if other >= 0:
        rows[longest].append(rows[shortest].pop(other))
    return True


@dataclasses.dataclass(frozen=True)
class Plan:
    """The micro-batches of a whole run, in order: a function of lengths and settings, so a resumed run meets the same.

    Attributes:
        micro_batches: the rows (of sample indices) of each.
        steps: optimiser steps.
        tokens: real tokens over the run.
        computed_tokens: tokens including padding.
        parts: micro-batches of a step, of all processes; of the last step there may be fewer.
    """

    micro_batches: list[Rows]
    steps: int
    tokens: int
    computed_tokens: int
    parts: int

    @property
    def efficiency(self) -> float:
        """Share of the computed tokens that are real."""
        return self.tokens / self.computed_tokens


def plan(
    lengths: Sequence[int],
    *,
    epochs: float,
    max_steps: int = 0,
    batch_size: int,
    grad_accum: int,
    capacity: int,
    seed: int,
    processes: int = 1,
) -> Plan:
    """Lay out a run: shuffle each epoch, cut the stream into steps, pack each step, split it into micro-batches.

    The stream of shuffled epochs is cut without regard to their ends: every step but the last has ``batch_size``
    samples.

    Args:
        lengths: tokens of each sample.
        epochs: passes over the samples; may be a fraction.
        max_steps: number of steps; above 0 it overrides ``epochs``.
        batch_size: samples in one step.
        grad_accum: micro-batches that one step is split into; changes memory, not the gradient.
        capacity: tokens a row may hold; 0 gives every sample its own row.
        seed: seed of the order.
        processes: that share the micro-batches of each step out in turn; each gets ``grad_accum`` of them, in a short
            last step empty ones. Which samples make a step does not depend on it.
    """
    parts = grad_accum * processes
    wanted = max_steps * batch_size if max_steps else max(1, round(epochs * len(lengths)))
    micro_batches: list[Rows] = []
    tokens = computed = 0
    stream = _shuffled(len(lengths), wanted, seed)
    for start in range(0, wanted, batch_size):
        chosen = stream[start : start + batch_size].tolist()
        rows = pack([lengths[index] for index in chosen], capacity, min_rows=parts)
        split = _split(rows, parts)
        for part in split:
            part = [[chosen[position] for position in row] for row in part]
            totals = [sum(lengths[index] for index in row) for row in part]
            tokens += sum(totals)
            computed += max(totals) * len(totals)
            micro_batches.append(part)
        micro_batches += [[] for _ in range(parts - len(split) if processes > 1 else 0)]
    return Plan(micro_batches, math.ceil(wanted / batch_size), tokens, computed, parts)


def _split(rows: Rows, parts: int) -> list[Rows]:
    """Return ``parts`` runs of neighbouring rows of nearly equal number; fewer where there are fewer rows."""
    parts = min(parts, len(rows))
    return [rows[part * len(rows) // parts : (part + 1) * len(rows) // parts] for part in range(parts)]


def _shuffled(n: int, wanted: int, seed: int) -> np.ndarray:
    epochs = [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(math.ceil(wanted / n))]
    return np.concatenate(epochs)[:wanted]


def collate(rows: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
    """Lay packed rows out as tensors.

    Returns:
        ``input_ids`` and ``labels`` int64, ``seq_idx`` int32, each (rows, tokens of the longest row), right padded.
        Samples of a row are numbered from 0 in ``seq_idx``; padding is -1 there and has no label. ``labels`` are not
        shifted: the model does that.
    """
    longest = max(sum(map(len, row)) for row in rows)
    kinds = {"input_ids": np.int64, "labels": np.int64, "seq_idx": np.int32}
    arrays = {name: np.full((len(rows), longest), PADDING_VALUES[name], dtype) for name, dtype in kinds.items()}
    for number, row in enumerate(rows):
        filled = 0
        for document, sample in enumerate(row):
            span = slice(filled, filled + len(sample))
            arrays["input_ids"][number, span] = sample.ids
            arrays["labels"][number, span] = sample.labels
            arrays["seq_idx"][number, span] = document
            filled = span.stop
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PlannedBatches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The micro-batches of a `Plan` as a dataset: item i is the i-th micro-batch of the run."""

    def __init__(self, samples: Sequence[Sample], plan: Plan) -> None:
        self.samples = samples
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan.micro_batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = self.plan.micro_batches[index]
        if not rows:  # a process that has nothing to do in a step takes part with a gradient of zero
            return collate([[Sample(np.zeros(2, dtype=np.int32), trained_from=2)]])
        return collate([[self.samples[sample] for sample in row] for row in rows])
