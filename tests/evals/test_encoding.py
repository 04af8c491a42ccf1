"""Texts encoded line by line have the tokens of whole texts, or are encoded whole."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mambacus.evals.encoding import Encoder, encodes_lines_alone
from mambacus.evals.prefixes import Tokens
from mambacus.models import load
from mambacus.models.tokenizer import neox_tokenizer

PIECES = [
    *"ab 'st12\n\n\n\r\t.!?<|>\u00a0\u2028\u0301é中\x1c\x85\ufeff", "<|endoftext|>", "  ", "    ", "'s", " \n",
    "\n\n", "Q: ",
]  # fmt: skip


def awkward_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choice(PIECES) for _ in range(draw.randint(1, 60))) for _ in range(count)]


def changed(tokenizer: Any, **parts: Any) -> Any:
    """Return the same tokenizer but for some parts of its ``tokenizer.json``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = json.loads(tokenizer.backend_tokenizer.to_str()) | parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


def hold(tokenizer: Any, texts: Sequence[str]) -> None:
    expected = [tuple(ids) for ids in tokenizer(list(texts))["input_ids"]]
    assert Encoder(tokenizer).encode(texts) == expected


def test_lines_of_the_embedded_tokenizer() -> None:
    _, tokenizer = load("tiny")
    assert encodes_lines_alone(tokenizer)
    hold(tokenizer, awkward_texts(3000))


def test_lines_of_gpt_neox(data_dir: Path) -> None:
    tokenizer = neox_tokenizer(data_dir, online=False)
    assert encodes_lines_alone(tokenizer)
    rows = (data_dir / "zeroshot/hellaswag").glob("*.jsonl")
    texts = [line for path in rows for line in path.read_text(encoding="utf-8").splitlines()[:200]]
    assert texts
    hold(tokenizer, [*awkward_texts(3000), *("\n\n".join(texts[at : at + 5]) for at in range(0, len(texts), 5))])


def test_a_line_in_common_is_encoded_once() -> None:
    _, tokenizer = load("tiny")
    seen: list[Tokens] = []

    def check(ids: Sequence[int]) -> Tokens:
        seen.append(tuple(ids))
        return tuple(ids)

    examples = "Question: 1 + 1?\nAnswer: 2\n\n"
    found = Encoder(tokenizer, check).encode([examples + "Question: 3?", examples + "Question: 4?"])
    assert len(seen) == len(set(seen)) == 4  # two lines of the example, two questions
    assert len(found[0]) == len(found[1]) < sum(map(len, seen))


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a\n"}, "content": "b"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }
        },
        {
            "added_tokens": [
                {
                    "id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": True, "rstrip": False,
                    "normalized": False, "special": True,
                }
            ]
        },
    ],
    ids=["metaspace", "prefix space", "no expression", "no cuts", "replaces", "adds a token", "eats spaces"],
)  # fmt: skip
def test_other_tokenizers_are_given_whole_texts(parts: dict[str, Any]) -> None:
    _, tokenizer = load("tiny")
    other = changed(tokenizer, **parts)
    assert not encodes_lines_alone(other)
    hold(other, [text for text in awkward_texts(200) if text])
