"""From tokens to text, token by token: characters that span tokens, and stop strings that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambacus.runtime.errors import UserError

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
_MOST_BYTES = 4  # of a character in UTF-8


class TextStream:
    """The text of a growing list of tokens.

    Only a window of the last tokens is decoded at each step, so a long completion costs no more per token than a short
    one. The window begins where a token's text was complete, and what it adds is the difference of two decodings,
    which is right also for tokenizers that treat the first token of a text differently.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text is in `_complete`
        self._base = ""  # text of those tokens, decoded alone
        self._complete = ""
        self._pending = ""  # text of the rest of the window, perhaps with an incomplete character at its end
        self._given = 0

    @property
    def text(self) -> str:
        """All of the text so far."""
        return self._complete + self._pending

    @property
    def length(self) -> int:
        """Characters so far, without one at the end of which there is only a part."""
        return len(self._complete) + len(self._pending.removesuffix(INCOMPLETE))

    def add(self, token: int) -> int | None:
        """Add one token; return where the first stop string begins, None if there is none."""
        before = len(self._complete)
        self._window.append(token)
        decoded = self._decode(self._window)
        self._pending = decoded[len(self._base) :]
        found = self._find_stop(max(0, before - self._longest))
        if not decoded.endswith(INCOMPLETE):
            self._settle(len(self._window), decoded)
        elif len(self._window) - self._settled > 2 * _MOST_BYTES:  # bytes that are no text; what can still become some?
            for rest in range(_MOST_BYTES, 0, -1):
                head = self._decode(self._window[:-rest])
                if head + self._decode(self._window[-rest:]) == decoded:
                    self._settle(len(self._window) - rest, head)
                    break
        return found

    def _settle(self, tokens: int, decoded: str) -> None:
        """Take the first ``tokens`` of the window, whose text is ``decoded``, for complete; they are the next base."""
        new = decoded[len(self._base) :]
        self._complete += new
        self._pending = self._pending[len(new) :]
        self._window = self._window[self._settled :]
        self._settled = tokens - self._settled
        self._base = self._decode(self._window[: self._settled])

    def take(self) -> str:
        """Return what is new and can no longer change or become part of a stop string."""
        end = len(self._complete) - self._possible_stop()
        new = self._complete[self._given : end]
        self._given = max(self._given, end)
        return new

    def close(self, text: str) -> str:
        """Return what is new if the whole text is ``text``."""
        return text[self._given :]

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens)

    def _find_stop(self, start: int) -> int | None:
        if not self._stop:
            return None
        text = self.text
        places = [place for place in (text.find(stop, start) for stop in self._stop) if place >= 0]
        return min(places, default=None)

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        tail = self._complete[-self._longest :] if self._longest else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self._stop):
                return len(tail) - start
        return 0


def stop_tokens(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """Return the special tokens that ``stop`` names.

    Texts are decoded without special tokens, so no text holds such a string; the tokens themselves are looked for.

    Raises:
        UserError: a string holds a special token and something else.
    """
    if tokenizer is None or not stop:
        return frozenset()
    special = {str(added): token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for text in stop:
        inside = next((name for name in special if name in text and name != text), None)
        if inside is not None and text not in special:
            raise UserError(f"stop: {text!r} holds the special token {inside}, which text never shows; name it alone")
    return frozenset(special[text] for text in stop if text in special)


def shown_tokens(tokenizer: Any, tokens: Sequence[int], text: str) -> list[int]:
    """Return the tokens of a completion as far as a reader has seen it: ``tokens`` up to a stop string.

    Where the stop string begins within a token, what comes before it there is cut into tokens of its own: the text is
    the one that was shown, its last tokens need not be those that the model would choose for it.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: of the completion, those of the stop string included.
        text: of the completion, cut before the stop string.
    """
    kept, seen = len(tokens), decode(tokenizer, tokens)
    while not text.startswith(seen):
        kept -= 1
        seen = decode(tokenizer, tokens[:kept])
    rest = text[len(seen) :]
    return [*tokens[:kept], *(tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else ())]


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of ``tokens`` as it stands, without special tokens; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
