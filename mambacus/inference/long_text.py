"""Tokens of a text that need not fit in memory: cut into windows, tokenized as the whole would be."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError

WINDOW = 1 << 16  # characters tokenized at once
OVERLAP = 1 << 11  # characters that two neighbouring windows share


def encode_file(tokenizer: Any, path: Path, flag: str, window: int = WINDOW, overlap: int = OVERLAP) -> array[int]:
    """Return the token ids of a UTF-8 text file without its last newline, at eight bytes a token.

    Neighbouring windows overlap. They are joined before a space in the middle of the overlap where both have a border
    of tokens and go on with the same ones, so that what stands far away decides nothing; where there is no such place
    the window grows. A tokenizer without offsets (a slow one) gets the whole text.

    Args:
        tokenizer: a transformers tokenizer.
        path: the file.
        flag: where the user named it.
        window: characters tokenized at once.
        overlap: characters that two windows share.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    ids = array("q")
    parts = _parts(path, flag, window if getattr(tokenizer, "is_fast", False) else -1)
    here = _Window(tokenizer, next(parts, ""))
    for part in parts:
        following = _Window(tokenizer, here.text[-overlap:] + part)
        join = _join(here, following, overlap)
        if join is None:
            here = _Window(tokenizer, here.text + part, here.first)
            continue
        ids.extend(here.ids[here.first : join[0]])
        here, here.first = following, join[1]
    ids.extend(here.ids[here.first :])
    return ids


class _Window:
    """Some of the text with its tokens, of which the first ``first`` belong to the window before."""

    def __init__(self, tokenizer: Any, text: str, first: int = 0) -> None:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=getattr(tokenizer, "is_fast", False))
        self.text, self.first = text, first
        self.ids: list[int] = found["input_ids"]
        self.offsets: list[tuple[int, int]] = found.get("offset_mapping", [])

    def borders(self, start: int, end: int) -> dict[int, int]:
        """Return the places from ``start`` to ``end`` where a token begins and none overlaps: place -> token."""
        places = {}
        for number in range(self.first + 1, len(self.ids)):
            place = self.offsets[number][0]
            if start <= place < end and self.offsets[number - 1][1] == place:
                places[place] = number
        return places


def _join(before: _Window, after: _Window, overlap: int) -> tuple[int, int] | None:
    """Return the first token of ``before`` and of ``after`` from which both are the same, None if there is none."""
    shift = len(before.text) - overlap  # of a place in the first window against the second
    low, high = overlap // 4, 3 * overlap // 4
    ours, theirs = before.borders(shift + low, shift + high), after.borders(low, high)
    text = after.text
    for place in sorted(theirs, key=lambda place: abs(place - overlap // 2)):
        if not text[place].isspace() or text[place - 1].isspace() or shift + place not in ours:
            continue
        mine, other = ours[shift + place], theirs[place]
        same = sum(1 for end in theirs if place <= end)  # tokens up to three quarters of the overlap
        if before.ids[mine : mine + same] == after.ids[other : other + same]:
            return mine, other
    return None


def _parts(path: Path, flag: str, size: int) -> Iterator[str]:
    """Yield a file's text in parts of ``size`` characters, the last without its final newline."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            part = file.read(size)
            while part:
                following = file.read(size)
                yield part if following else part.removesuffix("\n")
                part = following
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not UTF-8 text") from None
