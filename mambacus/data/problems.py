"""The one shape of a math problem, whatever its source."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class MathProblem:
    """A question with its final answer.

    Attributes:
        id: unique within its source.
        question: the text put to the model.
        answer: the final answer as a string (a number, an expression or the letter of an option).
        solution: worked text that leads to the answer, or None where the source has none.
        options: the choices of a multiple-choice question in order (A first), or None.
        source: where the problem comes from.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    options: tuple[str, ...] | None = None
    source: str = ""

    @property
    def group(self) -> str:
        """The part of its set that results are also reported for, or an empty string."""
        return ""

    def row(self) -> dict[str, Any]:
        """Return the problem as one JSON line for ``finetune --data``: a dict of its fields."""
        return dataclasses.asdict(self)
