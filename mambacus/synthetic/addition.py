"""Addition of two numbers of ``x`` digits each, the sum written plainly or from the last digit on.

``<start> 4 7 + 8 5 = 1 3 2 <end>``, reversed ``<start> 4 7 + 8 5 = 2 3 1 <end>``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mambacus.runtime.config import opt
from mambacus.synthetic.tasks import END, PAD, START, SYMBOLS, Tokens, unscored

PLUS, EQUALS = 3, 4


@dataclasses.dataclass(frozen=True)
class Addition:
    """Add; the answer is the sum, which has ``x`` or ``x + 1`` digits, with its end mark.

    Source: Lee et al. 2023, Teaching Arithmetic to Small Transformers (arXiv 2307.03381); only the sum is reversed,
    and numbers are not padded.
    """

    order: str = opt("plain", "how the sum is written", choices=("plain", "reversed"))
    x_name: ClassVar[str] = "digits"
    least_x: ClassVar[int] = 1
    most_x: ClassVar[int] = 1024
    pad: ClassVar[int] = PAD

    @property
    def vocab_size(self) -> int:
        """Marks and digits."""
        return SYMBOLS + 10

    def length(self, x: int) -> int:
        """Return the tokens of a row: both numbers, a sum of one digit more, four marks."""
        return 3 * x + 5

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return rows and labels as `mambacus.synthetic.tasks.Task.draw`."""
        left, right = (self._number(rng, rows, x) for _ in range(2))
        total, carry = np.empty((rows, x), np.int64), np.zeros(rows, np.int64)  # digits from the last one on
        for place in range(x):
            column = left[:, -1 - place] + right[:, -1 - place] + carry
            total[:, place], carry = column % 10, column // 10
        ids = np.full((rows, self.length(x)), PAD, np.int16)
        ids[:, 0], ids[:, x + 1], ids[:, 2 * x + 2] = START, PLUS, EQUALS
        ids[:, 1 : x + 1], ids[:, x + 2 : 2 * x + 2] = SYMBOLS + left, SYMBOLS + right
        answer = np.full((rows, x + 2), PAD, np.int64)
        answer[:, :x], answer[:, x] = SYMBOLS + total, END
        long = carry > 0
        answer[long, x], answer[long, x + 1] = SYMBOLS + carry[long], END
        if self.order == "plain":
            answer[:, :x] = np.where(long[:, None], answer[:, :x], answer[:, :x][:, ::-1])
            answer[long, : x + 1] = answer[long, : x + 1][:, ::-1]
        ids[:, 2 * x + 3 :] = answer
        labels = unscored(ids)
        labels[:, 2 * x + 3 :] = np.where(answer == PAD, labels[:, 2 * x + 3 :], answer)
        return ids, labels

    @staticmethod
    def _number(rng: np.random.Generator, rows: int, digits: int) -> np.ndarray:
        """Return digits int64 (rows, digits), the first of them not 0 unless it is the only one."""
        number = rng.integers(0, 10, (rows, digits))
        if digits > 1:
            number[:, 0] = rng.integers(1, 10, rows)
        return number
