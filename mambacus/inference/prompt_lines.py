"""Prompts in a JSONL file: one a line, each with what it wants otherwise than the rest."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mambacus.inference.engine import Engine
from mambacus.inference.sampling import SamplingParams
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import parse_line, read_jsonl

_NUMBER, _WHOLE = ((int, float), "a number"), ((int,), "a whole number")
_SETTINGS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_new_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "samples": _WHOLE,
    "seed": _WHOLE,
    "logprobs": _WHOLE,
    "stop": ((str, list), "a string or a list of strings"),
    "logit_bias": ((dict,), "an object of token id and number"),
    "ignore_eos": ((bool,), "true or false"),
}
_KEYS = ("prompt", "prompt_ids", "id", *_SETTINGS)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line.

    Attributes:
        number: of the line, from 1.
        id: what the line calls itself, any JSON value, or None.
        prompt: a text or token ids.
        params: how to complete it.
    """

    number: int
    id: Any
    prompt: str | list[int]
    params: SamplingParams


def read_prompts(source: str, defaults: SamplingParams, engine: Engine, *, continues: bool) -> list[PromptLine]:
    """Return the lines of a file, or of standard input for ``-``.

    Args:
        source: the file's name, or ``-``.
        defaults: how to complete a prompt that does not say.
        engine: checks what the lines ask for.
        continues: the prompts follow a state.

    Raises:
        UserError: the first line that cannot be honoured, named by its number; or no line at all.
    """
    name = "standard input" if source == "-" else source
    rows = _stdin_rows() if source == "-" else read_jsonl(Path(source))
    lines = []
    for number, row in rows:
        where = f"{name}, line {number}"
        try:
            line = PromptLine(number, _id(row), _prompt(row), _params(row, defaults))
            engine.check(line.prompt, line.params, continues=continues)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        lines.append(line)
    if not lines:
        raise UserError(f"{name}: expected one JSON object a line, found none")
    return lines


def _stdin_rows() -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, text in enumerate(sys.stdin, start=1):
            if text.strip():
                yield number, parse_line(text, f"standard input, line {number}")
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8 text; expected one JSON object a line") from None


def _id(row: dict[str, Any]) -> Any:
    """Return the line's name for itself, which must be possible to write again."""
    try:
        json.dumps(row.get("id"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("id: holds half of a surrogate pair, which is no character") from None
    return row.get("id")


def _prompt(row: dict[str, Any]) -> str | list[int]:
    unknown = next((key for key in row if key not in _KEYS), None)
    if unknown is not None:
        hint = suggest(unknown, _KEYS) or "; known: " + ", ".join(_KEYS)
        raise UserError(f"unknown key {unknown!r}{hint}")
    if ("prompt" in row) == ("prompt_ids" in row):
        raise UserError("expected either prompt (a text) or prompt_ids (a list of token ids)")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise UserError(f"prompt: expected a string, got {row['prompt']!r:.60}")
        return row["prompt"]
    ids = row["prompt_ids"]
    if not isinstance(ids, list) or not all(_is(token, (int,)) for token in ids):
        raise UserError(f"prompt_ids: expected a list of whole numbers, got {ids!r:.60}")
    return ids


def _params(row: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for key, (kinds, expected) in _SETTINGS.items():
        if key not in row:
            continue
        value = row[key]
        good = _is(value, kinds)
        if key == "stop" and good and isinstance(value, list):
            good = all(isinstance(text, str) for text in value)
        if not good:
            raise UserError(f"{key}: expected {expected}, got {value!r:.60}")
        changes["n" if key == "samples" else key] = _biases(value) if key == "logit_bias" else value
    return dataclasses.replace(defaults, **changes)


def _is(value: Any, kinds: Sequence[type]) -> bool:
    """Return whether ``value`` is of one of these types; true is no number, and no float holds one of 400 digits."""
    if float in kinds and isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))


def _biases(given: dict[str, Any]) -> dict[int, float]:
    if not all(token.isdecimal() and len(token) < 20 and _is(bias, (int, float)) for token, bias in given.items()):
        raise UserError(f"logit_bias: expected an object of token id and number, got {given!r:.60}")
    return {int(token): bias for token, bias in given.items()}
