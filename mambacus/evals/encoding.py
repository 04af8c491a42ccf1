"""Texts to tokens, where many texts have lines in common: every line is encoded once.

Requests of one task share their worked examples, and the choices of one document its context: encoded whole, hellaswag
with ten examples takes seven times the tokens. A tokenizer that first cuts its text with GPT-2's regular expression,
as GPT-NeoX's does, never joins what stands before a line break to the line break: tokens of the parts, side by side,
are those of the whole. Other tokenizers are given whole texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from mambacus.evals.prefixes import Tokens


def encodes_lines_alone(tokenizer: Any) -> bool:
    """Tell whether a text's tokens are those of its lines side by side, each with the line break before it.

    Args:
        tokenizer: of transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    if parts["truncation"] is not None or parts["padding"] is not None:
        return False
    cuts = parts["pre_tokenizer"] or {"type": None}
    *before, last = cuts["pretokenizers"] if cuts["type"] == "Sequence" else [cuts]
    if any(cut["type"] != "Digits" for cut in before):
        return False
    if last["type"] != "ByteLevel" or not last.get("use_regex", True) or last["add_prefix_space"]:
        return False
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC" or _adds_tokens(parts["post_processor"]):
        return False
    return not any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or len([*_lines(token["content"])]) > 1
        for token in parts["added_tokens"]
    )


def _adds_tokens(processor: dict[str, Any] | None) -> bool:
    """Tell whether a post-processor may put tokens before or behind those of a text."""
    if processor is None or processor["type"] == "ByteLevel":
        return False
    return processor["type"] != "TemplateProcessing" or any("Sequence" not in part for part in processor["single"])


class Encoder:
    """Encodes many texts at once.

    Args:
        tokenizer: of transformers; adds special tokens as it does by default.
        check: is given the tokens of each piece of text that was encoded, and returns them or raises.
    """

    def __init__(self, tokenizer: Any, check: Callable[[Sequence[int]], Tokens] = tuple) -> None:
        self._tokenizer, self._check = tokenizer, check
        self._by_lines = encodes_lines_alone(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text, as the tokenizer gives them for it alone.

        Args:
            texts: none empty.
        """
        if not texts:
            return []
        if not self._by_lines:
            return [self._check(ids) for ids in self._tokenizer(list(texts))["input_ids"]]
        cut = [[*_lines(text)] for text in texts]
        lines = [*dict.fromkeys(chain.from_iterable(cut))]
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(lines)  # which notes no places in the text
        tokens = {line: self._check(encoding.ids) for line, encoding in zip(lines, encodings, strict=True)}
        return [tuple(chain.from_iterable(map(tokens.__getitem__, parts))) for parts in cut]


def _lines(text: str) -> Iterator[str]:
    """Cut a text before each line break that stands behind a visible ASCII character.

    Neither GPT-2's expression nor Unicode's composition reaches across such a place.
    """
    begin, at = 0, text.find("\n", 1)
    while at > 0:
        if "!" <= text[at - 1] <= "~":
            yield text[begin:at]
            begin = at
        at = text.find("\n", at + 1)
    yield text[begin:]
