"""Phone-book look-up: a list of names and numbers, then the numbers of some of the names.

``<start> n a m : 4 0 7 ; k e y : 9 9 1 ; ... <ask> k e y : 9 9 1 ; n a m : 4 0 7 ;``; ``x`` is the number of entries.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mambacus.runtime.config import opt
from mambacus.synthetic.tasks import PAD, START, SYMBOLS, Tokens, unscored

ASK, IS, NEXT = 3, 4, 5
_LETTERS, _DIGITS = 26, 10


@dataclasses.dataclass(frozen=True)
class Phonebook:
    """Give the numbers of names that were listed; each number asked for is one answer.

    No name stands twice in a book. Several names are asked for in turn, so that a row of hundreds of tokens teaches
    more than one look-up.

    Source: Jelassi et al. 2024, Repeat After Me (arXiv 2402.01032); there with natural names and one question.
    """

    name_letters: int = opt(3, "letters of a name", least=1, most=6)
    number_digits: int = opt(4, "digits of a number", least=1, most=12)
    questions: int = opt(8, "names asked for in a row, all of them where a book has fewer", least=1)
    x_name: ClassVar[str] = "entries"
    least_x: ClassVar[int] = 1
    pad: ClassVar[int] = PAD

    @property
    def most_x(self) -> int:
        """A quarter of all names, so that drawing different ones stays quick."""
        return int(_LETTERS**self.name_letters // 4)

    @property
    def vocab_size(self) -> int:
        """Marks, letters and digits."""
        return SYMBOLS + _LETTERS + _DIGITS

    @property
    def entry(self) -> int:
        """Tokens of an entry: name, ``:``, number, ``;``."""
        return self.name_letters + self.number_digits + 2

    def length(self, x: int) -> int:
        """Return the tokens of a row: two marks, the entries and the questions."""
        return 2 + self.entry * (x + min(x, self.questions))

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return rows and labels as `mambacus.synthetic.tasks.Task.draw`."""
        asked = min(x, self.questions)
        names = _different(rng, rows, x, _LETTERS**self.name_letters)
        places = _LETTERS ** np.arange(self.name_letters)
        book = np.empty((rows, x, self.entry), np.int16)
        book[:, :, : self.name_letters] = SYMBOLS + names[:, :, None] // places % _LETTERS
        book[:, :, self.name_letters], book[:, :, -1] = IS, NEXT
        digits = rng.integers(0, _DIGITS, (rows, x, self.number_digits))
        book[:, :, self.name_letters + 1 : -1] = SYMBOLS + _LETTERS + digits
        chosen = rng.random((rows, x)).argsort(axis=1)[:, :asked]
        questions = np.take_along_axis(book, chosen[:, :, None], axis=1)
        answers = unscored(questions)
        answers[:, :, self.name_letters + 1 : -1] = questions[:, :, self.name_letters + 1 : -1]
        start, ask = np.full((rows, 1), START, np.int16), np.full((rows, 1), ASK, np.int16)
        ids = np.concatenate([start, book.reshape(rows, -1), ask, questions.reshape(rows, -1)], axis=1)
        labels = unscored(ids)
        labels[:, -asked * self.entry :] = answers.reshape(rows, -1)
        return ids, labels


def _different(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Return int64 (rows, count), different numbers in each row, drawn evenly from those below ``below``.

    Repeats are drawn again until there are none; with ``count`` at most a quarter of ``below`` that takes a few rounds.
    """
    drawn = rng.integers(0, below, (rows, count))
    while True:
        order = drawn.argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        repeats = np.zeros_like(drawn, bool)
        np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if not repeats.any():
            return drawn
        drawn = np.where(repeats, rng.integers(0, below, drawn.shape), drawn)
