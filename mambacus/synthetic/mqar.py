"""MQAR, multi-query associative recall: pairs of a key and a value, then each key again, in another order.

``<start> k1 v1 k2 v2 ... k2 v2 k1 v1 ...``; ``x`` is the number of pairs. Each value of the second part is an answer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mambacus.runtime.config import opt
from mambacus.synthetic.tasks import PAD, START, SYMBOLS, Tokens, unscored


@dataclasses.dataclass(frozen=True)
class Mqar:
    """Recall the value of every key; keys and values have vocabularies of their own, no key stands twice.

    Every key comes again just once, so a model that recalls nothing but strikes out values already given is right at
    ``(1 + 1/2 + ... + 1/x) / x`` of them (few repeat): 75 % of 2 pairs, 52 % of 4, 7 % of 64.

    Source: Arora et al. 2023, Zoology (arXiv 2312.04927). There queries are spread over the
    row by a power law with filler between; here they follow each other, so that no token is idle.
    """

    keys: int = opt(512, "different keys", least=2, most=15_000)
    values: int = opt(512, "different values", least=2, most=15_000)
    x_name: ClassVar[str] = "pairs"
    least_x: ClassVar[int] = 1
    pad: ClassVar[int] = PAD

    @property
    def most_x(self) -> int:
        """All keys."""
        return self.keys

    @property
    def vocab_size(self) -> int:
        """Marks, keys and values."""
        return SYMBOLS + self.keys + self.values

    def length(self, x: int) -> int:
        """Return the tokens of a row: every pair twice, and a mark."""
        return 4 * x + 1

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return rows and labels as `mambacus.synthetic.tasks.Task.draw`."""
        keys = rng.random((rows, self.keys), np.float32).argpartition(x - 1, axis=1)[:, :x]
        keys = rng.permuted(keys, axis=1)  # argpartition's order is not random
        values = self.keys + rng.integers(0, self.values, (rows, x))
        pairs = (SYMBOLS + np.stack([keys, values], axis=2)).astype(np.int16)  # (rows, x, 2)
        order = rng.random((rows, x)).argsort(axis=1)
        queries = np.take_along_axis(pairs, order[:, :, None], axis=1)
        start = np.full((rows, 1), START, np.int16)
        ids = np.concatenate([start, pairs.reshape(rows, -1), queries.reshape(rows, -1)], axis=1)
        labels = unscored(ids)
        labels[:, 2 * x + 2 :: 2] = ids[:, 2 * x + 2 :: 2]
        return ids, labels
