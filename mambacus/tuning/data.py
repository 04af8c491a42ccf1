"""From a question-answer source to token arrays; whatever is left out is counted.

A training text is ``qa_prompt(question, options) + qa_completion(solution, answer)`` and the end-of-text token. Prompt
and completion are tokenised apart, because that is what a model meets when it is asked: the tokens of the prompt alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambacus.data import wordproblems
from mambacus.data.problems import MathProblem
from mambacus.data.prompts import ANSWER_MARK, qa_completion, qa_prompt
from mambacus.data.sources import load_math, read_options, training_split
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_jsonl

IGNORED = -100  # the target of a position that is not trained on; torch's default ignore_index


@dataclasses.dataclass(frozen=True)
class Example:
    """The text a model is given and the text it shall learn to continue it with."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tokenised example.

    Attributes:
        ids: int32 (length,): prompt, completion and the end-of-text token.
        trained_from: index in ``ids`` of the first token that is trained on, at least 1: nothing precedes the first.
    """

    ids: np.ndarray
    trained_from: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """The tokens, int32 (length,), with `IGNORED` where they are not trained on."""
        labels = self.ids.copy()
        labels[: self.trained_from] = IGNORED
        return labels


def read_examples(source: str, *, data_dir: Path | None = None, seed: int = 0) -> list[Example]:
    """Read the training rows of ``source``.

    Args:
        source: a JSONL file whose rows hold ``question`` and ``answer`` and may hold ``solution`` and ``options`` (a
            list of choices; the answer is then a letter); ``wordproblems:N`` (N generated problems); or the name of a
            math set under ``data_dir``, whose training split is taken (``gsm8k``, or ``gsm8k:1000`` for its first
            thousand); or the id of a dataset on the hub, ``owner/name``, whose ``train`` split has the columns of the
            JSONL file.
        data_dir: folder of the math sets.
        seed: seed of the generator.

    Raises:
        UserError: no such file or set, a broken line (with its number), or no rows at all.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"--data {source}: expected a JSONL file, got a folder")
    if path.suffix in (".jsonl", ".json") or path.is_file():
        examples = [_checked_row(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    else:
        examples = _named_set(*_name_and_limit(source), data_dir, seed)
    if not examples:
        raise UserError(f"--data {source}: no rows")
    return examples


def _name_and_limit(source: str) -> tuple[str, int | None]:
    name, colon, limit = source.partition(":")
    if colon and not (limit.isdecimal() and int(limit) > 0):
        raise UserError(f"--data {source}: expected a number of rows after the colon, got {limit!r}")
    return name, int(limit) if limit else None


def _named_set(name: str, limit: int | None, data_dir: Path | None, seed: int) -> list[Example]:
    if "/" in name:
        rows = _hub_rows(name)
        return [
            _checked_row(row, f"{name}, row {number}") for number, row in enumerate(itertools.islice(rows, limit), 1)
        ]
    if name == "wordproblems" and limit:
        problems: Sequence[MathProblem] = wordproblems.generate(limit, "train", seed)
    else:
        problems = load_math(data_dir, name, training_split(name), seed=seed)[:limit]
    return [Example(qa_prompt(p.question, p.options), qa_completion(p.solution, p.answer)) for p in problems]


def _hub_rows(name: str) -> Iterable[dict[str, Any]]:
    """Return the rows of the ``train`` split of a dataset on the hub."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    failures = (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError)
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, split="train")
    except failures as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--data {name}: no such file, and not to be had from the hub ({reason})") from None
    return rows


def _checked_row(row: dict[str, Any], where: str) -> Example:
    question = _text(row, "question", where)
    answer = _text(row, "answer", where)
    solution = _text(row, "solution", where) if row.get("solution") is not None else None
    prompt = qa_prompt(question, read_options(row, answer, where))
    if solution is None and len(answer.split()) > 1:  # the worked answer itself, as in GSM8K's own files
        return Example(prompt, f" {answer}")
    return Example(prompt, qa_completion(solution, answer))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(
            f"{where}: missing key {key!r}; a row needs question and answer, got {', '.join(row) or 'no keys'}"
        )
    value = row[key]
    if key == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected text, got a {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: {key} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {key}: expected text, got half of a surrogate pair in it") from None
    return value.strip()


def encode(
    examples: list[Example], tokenizer: Any, *, max_length: int, loss: str = "answer"
) -> tuple[list[Sample], dict[str, Any]]:
    """Tokenise examples; those longer than ``max_length`` are dropped, because a cut answer teaches not to finish.

    Args:
        examples: what `read_examples` gave.
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        max_length: tokens of prompt, completion and end-of-text together.
        loss: ``answer`` trains on the completion only, ``full`` on every token after the first.

    Returns:
        The samples in the order of their rows, and the counts for the record: ``rows, kept, dropped: {reason: n},
        truncated, duplicates`` (exact repetitions, kept), ``without_answer_line, tokens, trained_tokens``.

    Raises:
        UserError: the tokenizer has no end-of-text token, or nothing is left.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the model's tokenizer has no end-of-text token; a tuned model could not learn to stop")
    prompts = _token_ids(tokenizer, [example.prompt for example in examples])
    completions = _token_ids(tokenizer, [example.completion for example in examples])
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) + len(completion) + 1 <= max_length:
            ids = np.array([*prompt, *completion, eos], dtype=np.int32)
            samples.append(Sample(ids, trained_from=len(prompt) if loss == "answer" else 1))
    too_long = len(examples) - len(samples)
    if not samples:
        raise UserError(f"--max-length {max_length}: all {len(examples)} rows are longer")
    counts = {
        "rows": len(examples),
        "kept": len(samples),
        "dropped": {f"longer than {max_length} tokens": too_long} if too_long else {},
        "truncated": 0,
        "duplicates": len(examples) - len(set(examples)),
        "without_answer_line": sum(ANSWER_MARK not in example.completion for example in examples),
        "tokens": sum(map(len, samples)),
        "trained_tokens": sum(len(sample) - sample.trained_from for sample in samples),
    }
    return samples, counts


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return encoded
