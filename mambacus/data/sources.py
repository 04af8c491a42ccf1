"""The layout of ``--data-dir``: which file holds which set, and how its rows read.

::

    <data-dir>/math/<name>/<split>.jsonl          id, question, answer, solution, options, source
    <data-dir>/text/books_train_1.jsonl.gz ...    id, title, text         (pre-training of the embedded model)
    <data-dir>/text/stories_train.jsonl           id, title, text
    <data-dir>/text/arithmetic_train.jsonl.gz     id, question, answer
    <data-dir>/tokenizer/20B_tokenizer.json       the GPT-NeoX tokenizer of the published Mamba checkpoints
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mambacus.data import wordproblems
from mambacus.data.problems import MathProblem
from mambacus.data.prompts import OPTION_LETTERS
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import parse_line, read_jsonl

MATH_SPLITS: Mapping[str, tuple[str, ...]] = {
    "gsm8k": ("train", "test"),
    "gsm_hard": ("test",),
    "svamp": ("test",),
    "asdiv": ("test", "test_numeric"),
    "mawps": ("test",),
    "aqua": ("train_flan", "dev", "test"),
    "mathqa": ("dev", "test"),
    "mathqa_gain_lila": ("train", "dev", "test"),
    "math": ("train", "test", "math500"),
    "tinygsm_sample": ("train",),
    "sft_mix": ("train",),
    "wordproblems": wordproblems.SPLITS,
}
WORDPROBLEM_COUNTS = {"train": 8000, "test": 1000, "reworded": 1000, "novel": 1000}

TEXT_FILES: Mapping[str, tuple[str, ...]] = {
    "books_train": tuple(f"books_train_{part}.jsonl.gz" for part in range(1, 6)),
    "books_valid": ("books_valid.jsonl.gz",),
    "stories_train": ("stories_train.jsonl",),
    "stories_valid": ("stories_valid.jsonl",),
    "arithmetic_train": ("arithmetic_train.jsonl.gz",),
}
NEOX_TOKENIZER = Path("tokenizer") / "20B_tokenizer.json"


def math_file(data_dir: Path | None, name: str, split: str) -> Path:
    """Return the JSONL file of one split of a math set.

    Raises:
        UserError: unknown set or split (with suggestions), no ``data_dir`` given, or no such folder or file.
    """
    _check_math(name, split)
    path = data_folder(data_dir, f"the math set {name!r}") / "math" / name / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"--data-dir: {name} {split}: expected a file {path}")
    return path


def load_math(data_dir: Path | None, name: str, split: str, *, seed: int = 0) -> list[MathProblem]:
    """Return the problems of one split of a math set, in file order.

    ``wordproblems`` is generated (8000 training problems, 1000 of every other split) and needs no folder.

    Args:
        data_dir: the folder of ``--data-dir``; None is fine for ``wordproblems`` alone.
        name: a key of `MATH_SPLITS`.
        split: one of the set's splits.
        seed: seed of ``wordproblems``; other sets ignore it.

    Raises:
        UserError: as `math_file`, or a row without question or answer (file and line named).
    """
    if name == "wordproblems":
        _check_math(name, split)
        return [*wordproblems.generate(WORDPROBLEM_COUNTS[split], split, seed)]
    path = math_file(data_dir, name, split)
    return [_math_problem(row, path, number) for number, row in read_jsonl(path)]


def _check_math(name: str, split: str) -> None:
    if name not in MATH_SPLITS:
        known = ", ".join(MATH_SPLITS)
        raise UserError(f"unknown math set {name!r}: expected one of {known}{suggest(name, MATH_SPLITS)}")
    if split not in MATH_SPLITS[name]:
        raise UserError(f"{name} has no split {split!r}: expected {' or '.join(MATH_SPLITS[name])}")


def training_split(name: str) -> str:
    """Return the split of a math set that is trained on.

    Raises:
        UserError: unknown set (with suggestions), or one without such a split.
    """
    split = next((split for split in MATH_SPLITS.get(name, ()) if split.startswith("train")), "train")
    _check_math(name, split)
    return split


def read_options(row: Mapping[str, Any], answer: str, where: str) -> tuple[str, ...] | None:
    """Return the choices of a row, None if it has none.

    Raises:
        UserError: they are not at most ten texts, or ``answer`` is not the letter of one; it begins with ``where``.
    """
    options = row.get("options")
    if not options:
        return None
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise UserError(f"{where}: options: expected a list of texts, got {options!r}")
    letters = OPTION_LETTERS[: len(options)]
    if len(options) > len(letters):
        raise UserError(f"{where}: options: expected at most {len(OPTION_LETTERS)}, got {len(options)}")
    if answer.strip().upper() not in [*letters]:
        raise UserError(
            f"{where}: answer: expected one of {', '.join(letters)} for {len(options)} options, got {answer!r}"
        )
    return tuple(options)


def _math_problem(row: dict[str, Any], path: Path, line: int) -> MathProblem:
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{path}, line {line}: {key!r}: expected a text, got {row.get(key)!r}")
    if not isinstance(row.get("solution"), (str, type(None))):
        raise UserError(f"{path}, line {line}: 'solution': expected a text, got {row['solution']!r}")
    return MathProblem(
        id=str(row.get("id", f"{path.parent.name}-{path.stem}-{line}")),
        question=row["question"],
        answer=row["answer"],
        solution=row.get("solution"),
        options=read_options(row, row["answer"], f"{path}, line {line}"),
        source=str(row.get("source", "")),
    )


def data_folder(data_dir: Path | None, purpose: str) -> Path:
    """Return ``data_dir``, checked.

    Raises:
        UserError: it was not given or is not a folder; the message says what needs it.
    """
    if data_dir is None:
        raise UserError(f"--data-dir: missing; {purpose} is read from there")
    if not data_dir.is_dir():
        raise UserError(f"--data-dir: no such folder: {data_dir}")
    return data_dir


def text_files(data_dir: Path | None, name: str) -> list[Path]:
    """Return the files of one text source, a key of `TEXT_FILES`.

    Raises:
        UserError: unknown source, no folder, or a file of it is missing.
    """
    if name not in TEXT_FILES:
        raise UserError(f"unknown text source {name!r}: expected one of {', '.join(TEXT_FILES)}")
    folder = data_folder(data_dir, f"the text source {name!r}") / "text"
    paths = [folder / file for file in TEXT_FILES[name]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"--data-dir: {folder}: missing {', '.join(missing)}")
    return paths


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        UserError: the file is not what its name says; the message names it.
    """
    if path.suffix != ".gz":
        for _, row in read_jsonl(path):
            yield row
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_line(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
