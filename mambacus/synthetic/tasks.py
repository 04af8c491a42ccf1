"""What a task is, and the table of tasks."""

from __future__ import annotations

import typing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mambacus.runtime.config import check, from_mapping
from mambacus.runtime.errors import UserError, suggest

Tokens = npt.NDArray[np.int16]

IGNORE = -100  # the label of a token that is not scored
PAD, START, END = 0, 1, 2  # tokens that the symbolic tasks share; their symbols begin at `SYMBOLS`
SYMBOLS = 8


class Task(Protocol):
    """A family of problems with one axis of difficulty, ``x``.

    Attributes:
        x_name: what ``x`` counts.
        least_x: smallest ``x``.
        most_x: largest ``x``.
        pad: the token that fills rows at the right.
    """

    x_name: str
    least_x: int
    pad: int

    @property
    def most_x(self) -> int:
        """Largest ``x``."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def length(self, x: int) -> int:
        """Return the tokens of a row of difficulty ``x``."""
        ...

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return ``input_ids`` and ``labels``, int16 (rows, length(x)).

        A label is the token itself where it is scored, else `IGNORE`. Consecutive scored tokens are one answer, which
        the tokens before it determine.
        """
        ...


def make_task(kind: str, settings: dict[str, Any], where: str) -> Task:
    """Return the task ``kind`` with these settings.

    Raises:
        UserError: unknown kind or setting, or a value out of range; the message begins with ``where``.
    """
    from mambacus.synthetic.addition import Addition
    from mambacus.synthetic.copying import Copying
    from mambacus.synthetic.mqar import Mqar
    from mambacus.synthetic.phonebook import Phonebook
    from mambacus.synthetic.words import Words

    kinds: dict[str, Any] = {
        "copy": Copying, "phonebook": Phonebook, "mqar": Mqar, "addition": Addition, "wordproblems": Words,
    }  # fmt: skip
    if kind not in kinds:
        raise UserError(f"{where}: kind: expected one of {', '.join(kinds)}, got {kind!r}{suggest(kind, kinds)}")
    made = kinds[kind]
    fields = {name: hint for name, hint in typing.get_type_hints(made).items() if name in made.__dataclass_fields__}
    task: Task = made(**from_mapping(settings, fields, where))
    check(task, where=where)
    return task


def unscored(ids: Tokens) -> Tokens:
    """Return labels that score no token of ``ids``."""
    return np.full_like(ids, IGNORE)
