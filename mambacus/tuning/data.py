"""From a source of rows to token arrays; whatever is left out is counted and listed.

A training text of a question is ``qa_prompt(question, options) + qa_completion(solution, answer)`` and the end-of-text
token. Prompt and completion are tokenised apart, because that is what a model meets when it is asked: the tokens of the
prompt alone. Rows are read, converted and tokenised in chunks, so a source may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambacus.data import wordproblems
from mambacus.data.problems import MathProblem
from mambacus.data.prompts import ANSWER_MARK, qa_completion, qa_prompt
from mambacus.data.sources import load_math, training_split
from mambacus.runtime.errors import UserError
from mambacus.tuning.converters import CONVERTERS, converter_for
from mambacus.tuning.overlap import OverlapFilter
from mambacus.tuning.rows import NumberedRow, file_rows, hub_rows, is_file_source
from mambacus.tuning.schemas import EMPTY_TURN, Example, examples_of

__all__ = ["IGNORED", "Example", "LeftOut", "Sample", "encode", "encode_stream", "iterate_examples", "read_examples"]

IGNORED = -100  # the target of a position that is not trained on; torch's default ignore_index
CHUNK = 2048  # examples tokenised at once, in parallel by the tokenizer's own threads
LISTED = 10_000  # rows of a listing at most; beyond that they are only counted


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


class LeftOut:
    """Counts and lists the rows that are dropped, repeated or cut.

    Attributes:
        dropped: reason -> rows.
        listed: ``{row, reason, text}`` (``row``: file and line) of the first `LISTED` of them.
    """

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.listed: list[dict[str, str]] = []

    def drop(self, where: str, reason: str, text: str) -> None:
        """Count a row that is not trained on."""
        self.dropped[reason] += 1
        self.note(where, reason, text)

    def note(self, where: str, reason: str, text: str) -> None:
        """List a row without counting it as dropped."""
        if len(self.listed) < LISTED:
            self.listed.append({"row": where, "reason": reason, "text": text[:200]})


def read_examples(source: str, *, data_dir: Path | None = None, seed: int = 0, convert: str = "auto") -> list[Example]:
    """Return what `iterate_examples` yields, as a list."""
    return list(iterate_examples(source, data_dir=data_dir, seed=seed, convert=convert))


def iterate_examples(
    source: str,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    convert: str = "auto",
    tokenizer: Any = None,
    left_out: LeftOut | None = None,
) -> Iterator[Example]:
    """Yield the training examples of ``source``; memory holds a few rows at a time.

    Args:
        source: a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file with rows of one of the schemas of
            `mambacus.tuning.schemas.examples_of`; ``wordproblems:N`` (N generated problems); the name of a math set
            under ``data_dir``, whose training split is taken (``gsm8k``, or ``gsm8k:1000`` for its first thousand); or
            the id of a dataset on the hub, ``owner/name``, whose ``train`` split has the columns of a file.
        data_dir: folder of the math sets.
        seed: seed of the generator.
        convert: a key of `CONVERTERS`, ``none``, or ``auto``: by the set's id or its columns.
        tokenizer: has the chat template for rows of ``messages``.
        left_out: receives the rows whose final answer could not be read.

    Raises:
        UserError: no such file or set, a broken line (with its number), or no rows at all.
    """
    if convert not in ("auto", "none", *CONVERTERS):
        raise UserError(f"--convert: expected one of auto, none, {', '.join(CONVERTERS)}, got {convert!r}")
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"--data {source}: expected a JSONL file, got a folder")
    name, limit = ("", None) if is_file_source(source) else _name_and_limit(source)
    if not name or "/" in name:
        rows = itertools.islice(hub_rows(name), limit) if name else file_rows(path)
        examples = _converted(rows, name or source, convert, tokenizer, left_out or LeftOut())
    else:
        examples = _named_set(name, limit, data_dir, seed)
    first = next(examples, None)
    if first is None:
        raise UserError(f"--data {source}: no rows")
    yield first
    yield from examples


def _name_and_limit(source: str) -> tuple[str, int | None]:
    name, colon, limit = source.partition(":")
    if colon and not (limit.isdecimal() and int(limit) > 0):
        raise UserError(f"--data {source}: expected a number of rows after the colon, got {limit!r}")
    return name, int(limit) if limit else None


def _named_set(name: str, limit: int | None, data_dir: Path | None, seed: int) -> Iterator[Example]:
    if name == "wordproblems" and limit:
        problems: Sequence[MathProblem] = wordproblems.generate(limit, "train", seed)
    else:
        problems = load_math(data_dir, name, training_split(name), seed=seed)[:limit]
    return (
        Example(qa_prompt(p.question, p.options), qa_completion(p.solution, p.answer), where=f"{name}, row {number}")
        for number, p in enumerate(problems, 1)
    )


def _converted(
    rows: Iterable[NumberedRow], source: str, convert: str, tokenizer: Any, left_out: LeftOut
) -> Iterator[Example]:
    for where, row in rows:
        name = converter_for(convert, source, row)
        if not name:
            yield from examples_of(row, where, tokenizer, left_out.drop)
            continue
        plain = CONVERTERS[name](row)
        if plain is None:
            left_out.drop(where, f"no final answer ({name})", str(row))
        else:
            yield from examples_of({key: value for key, value in plain.items() if value}, where)


def encode(
    examples: Iterable[Example], tokenizer: Any, *, max_length: int, loss: str = "answer"
) -> tuple[list[Sample], dict[str, Any]]:
    """Return what `encode_stream` yields as a list, and the counts for the record.

    Raises:
        UserError: as `encode_stream`, or nothing is left.
    """
    counts: dict[str, Any] = {}
    return list(encode_stream(examples, tokenizer, counts, max_length=max_length, loss=loss)), counts


def encode_stream(
    examples: Iterable[Example],
    tokenizer: Any,
    counts: dict[str, Any],
    *,
    max_length: int,
    loss: str = "answer",
    drop_duplicates: bool = False,
    overlap: OverlapFilter | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """Tokenise examples; those longer than ``max_length`` are dropped, because a cut answer teaches not to finish.

    Running text is no answer: it is cut into pieces of ``max_length``, the last of which has the end-of-text token.

    Args:
        examples: what `iterate_examples` gave.
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        counts: receives, at the end, the counts for the record: ``rows, kept, dropped: {reason: n}, truncated,
            split, duplicates, without_answer_line, tokens, trained_tokens``.
        max_length: tokens of prompt, completion and end-of-text together.
        loss: ``answer`` trains on the completion only, ``full`` on every token after the first.
        drop_duplicates: leave exact repetitions out instead of keeping and counting them.
        overlap: leave out what shares a piece with these evaluation sets.
        left_out: receives what is left out or repeated.

    Raises:
        UserError: the tokenizer has no end-of-text token, or nothing is left.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the model's tokenizer has no end-of-text token; a tuned model could not learn to stop")
    ledger = left_out or LeftOut()
    totals: Counter[str] = Counter()
    wanted = _wanted(examples, totals, ledger, drop_duplicates, overlap)
    while chunk := list(itertools.islice(wanted, CHUNK)):
        prompts = _token_ids(tokenizer, [example.prompt for example in chunk])
        completions = _token_ids(tokenizer, [example.completion for example in chunk])
        for example, prompt, completion in zip(chunk, prompts, completions, strict=True):
            ids = np.array([*prompt, *completion, eos], dtype=np.int32)
            trained_from = max(1, len(prompt)) if loss == "answer" else 1
            if len(ids) > max_length and not example.is_text:
                reason = f"longer than {max_length} tokens"
                ledger.drop(example.where, reason, example.prompt + example.completion)
                continue
            totals["split"] += len(ids) > max_length
            for start in range(0, len(ids), max_length):
                sample = Sample(ids[start : start + max_length], 1 if start else trained_from)
                if len(sample) > 1:
                    totals["kept"] += 1
                    totals["tokens"] += len(sample)
                    totals["trained_tokens"] += len(sample) - sample.trained_from
                    yield sample
    if not totals["kept"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in ledger.dropped.items())
        too_long = set(ledger.dropped) == {f"longer than {max_length} tokens"}
        raise UserError(
            f"--max-length {max_length}: all {totals['rows']} rows are longer"
            if too_long
            else f"no row left: {reasons}"
        )
    unread = sum(
        number for reason, number in ledger.dropped.items() if reason.startswith(("no final answer", EMPTY_TURN))
    )
    counts |= {
        "rows": totals["rows"] + unread,
        "kept": totals["kept"],
        "dropped": dict(ledger.dropped),
        "truncated": 0,
        "split": totals["split"],
        "duplicates": totals["duplicates"],
        "without_answer_line": totals["without_answer_line"],
        "tokens": totals["tokens"],
        "trained_tokens": totals["trained_tokens"],
    }


def _wanted(
    examples: Iterable[Example],
    totals: Counter[str],
    ledger: LeftOut,
    drop_duplicates: bool,
    overlap: OverlapFilter | None,
) -> Iterator[Example]:
    """Yield the examples to tokenise; count all, leave out what is not wanted."""
    seen: set[int] = set()
    for example in examples:
        totals["rows"] += 1
        totals["without_answer_line"] += ANSWER_MARK not in example.completion
        text = example.prompt + example.completion
        found = overlap.find(text) if overlap else None
        key = hash(example)
        repeated = key in seen
        seen.add(key)
        if found:
            ledger.drop(example.where, f"overlaps {found}", text)
            continue
        if repeated:
            totals["duplicates"] += 1
            if drop_duplicates:
                ledger.drop(example.where, "repeated", text)
                continue
            ledger.note(example.where, "repeated, kept", text)
        yield example


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return encoded
