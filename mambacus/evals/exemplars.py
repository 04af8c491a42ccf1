"""Worked examples put before a math problem: the first rows of a training set, or programs of this project's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import qa_completion, qa_prompt
from mambacus.data.sources import load_math, training_split
from mambacus.runtime.errors import UserError

SEPARATOR = "\n\n"

# Question, program, answer; written for this project, so that they are in no test set.
PROGRAMS = (
    (
        "A baker sells 14 rolls in the morning and twice as many in the afternoon. Each roll costs 3 dollars. "
        "How many dollars does he take in?",
        "morning = 14\nafternoon = 2 * morning\nprice = 3\nanswer = (morning + afternoon) * price\nprint(answer)",
        "126",
    ),
    (
        "Nina had 45 stickers. She gave 12 to her brother and shared the rest equally among herself and 2 friends. "
        "How many stickers did each of them get?",
        "stickers = 45\nleft = stickers - 12\nchildren = 1 + 2\nanswer = left // children\nprint(answer)",
        "11",
    ),
    (
        "A tank holds 200 liters and is 35% full. A pump adds 6.5 liters each minute. How many minutes does it take to "
        "fill the tank?",
        "tank = 200\nmissing = tank * (1 - 0.35)\nanswer = missing / 6.5\nprint(answer)",
        "20",
    ),
    (
        "A train leaves at 9:40 and travels 150 km at 60 km per hour. How many minutes does the journey take?",
        "distance = 150\nspeed = 60\nhours = distance / speed\nanswer = hours * 60\nprint(answer)",
        "150",
    ),
)


def program_examples(count: int) -> str:
    """Return ``count`` questions with programs, ready to stand before a prompt.

    Raises:
        UserError: there are fewer.
    """
    if count > len(PROGRAMS):
        raise UserError(f"--num-fewshot {count}: expected at most {len(PROGRAMS)} with --style program")
    texts = [
        f"{qa_prompt(question)} ```python\n{program}\n```\n#### {answer}"
        for question, program, answer in PROGRAMS[:count]
    ]
    return "".join(text + SEPARATOR for text in texts)


def worked_examples(source: str, data_dir: Path | None, count: int, *, direct: bool) -> str:
    """Return the first ``count`` problems of a training set that have a solution, ready to stand before a prompt.

    Args:
        source: a key of `sources.MATH_SPLITS`.
        data_dir: the folder of ``--data-dir``.
        count: how many.
        direct: give the answers without their solutions.

    Raises:
        UserError: no such data, or fewer problems.
    """
    rows = load_math(data_dir, source, training_split(source)) if count else []
    chosen: Sequence[MathProblem] = [row for row in rows if row.solution][:count]
    if len(chosen) < count:
        raise UserError(f"--num-fewshot {count}: {source} has {len(chosen)} worked examples")
    return "".join(
        qa_prompt(row.question, row.options) + qa_completion(None if direct else row.solution, row.answer) + SEPARATOR
        for row in chosen
    )
