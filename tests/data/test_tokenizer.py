"""The tokenizer: every digit alone, special tokens where the model expects them, readable by transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mambacus.data.corpus import narratives, sum_sheets
from mambacus.data.tokenizer import EOS_TOKEN, PAD_TOKEN, train_tokenizer, transformers_tokenizer
from mambacus.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers_tokenizer(train_tokenizer([*narratives(0, 0, 1500), *sum_sheets(0, 0, 20)], 600))


def test_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS_TOKEN, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD_TOKEN, 1)
    assert len(tokenizer) == 600


def test_no_token_joins_a_digit_with_anything(tokenizer: Any) -> None:
    with_digit = [token for token in tokenizer.get_vocab() if any(letter in "0123456789" for letter in token)]
    assert sorted(with_digit) == list("0123456789")


def test_digits_are_spelled_the_same_everywhere(tokenizer: Any) -> None:
    digits = tokenizer.convert_tokens_to_ids(list("1742"))
    for text in ("1742", " 1742", "= 1742", "x1742.", "\n1742"):
        ids = tokenizer.encode(text)
        assert [i for i in ids if i in digits] == digits, text


def test_any_text_round_trips(tokenizer: Any) -> None:
    rng = random.Random(0)
    for text in ("Mia's 3 apples — “so”", "17 + 25 = 42\n#### 42", "  a\n\n b ", "日本 ½ 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    noise = "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(500))
    assert tokenizer.decode(tokenizer.encode(noise)) == noise


def test_saved_beside_a_mamba_config_it_reads_the_same(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MambaConfig

    tokenizer.save_pretrained(tmp_path)
    text = "120 - 17 = 103 apples\n#### 103"
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert alone.encode(text) == tokenizer.encode(text)
    MambaConfig(vocab_size=600).save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert beside.encode(text) == tokenizer.encode(text)
    assert (beside.eos_token_id, beside.pad_token_id) == (0, 1)


@pytest.mark.parametrize(("size", "message"), [(100, "at least 258"), (60_000, "no more than")])
def test_wrong_sizes(size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(["a b c"], size)
