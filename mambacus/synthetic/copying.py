"""Copying: a string of random letters, a mark, the string again.

``<start> q d a <mark> q d a <end>``; ``x`` is the length of the string.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mambacus.runtime.config import opt
from mambacus.synthetic.tasks import END, PAD, START, SYMBOLS, Tokens, unscored

MARK = 3


@dataclasses.dataclass(frozen=True)
class Copying:
    """Copy a string; the answer is the copy with its end mark.

    Source: Jelassi et al. 2024, Repeat After Me (arXiv 2402.01032): uniform letters of a small alphabet.
    """

    alphabet: int = opt(26, "letters", least=2, most=30_000)
    x_name: ClassVar[str] = "letters"
    least_x: ClassVar[int] = 1
    most_x: ClassVar[int] = 4096
    pad: ClassVar[int] = PAD

    @property
    def vocab_size(self) -> int:
        """Marks and letters."""
        return SYMBOLS + self.alphabet

    def length(self, x: int) -> int:
        """Return the tokens of a row: the string twice and three marks."""
        return 2 * x + 3

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return rows and labels as `mambacus.synthetic.tasks.Task.draw`."""
        ids = np.empty((rows, self.length(x)), np.int16)
        ids[:, 0], ids[:, x + 1], ids[:, -1] = START, MARK, END
        ids[:, 1 : x + 1] = rng.integers(SYMBOLS, self.vocab_size, (rows, x))
        ids[:, x + 2 : -1] = ids[:, 1 : x + 1]
        labels = unscored(ids)
        labels[:, x + 2 :] = ids[:, x + 2 :]
        return ids, labels
