"""Windows of a long text: the same tokens as the whole, for every kind of tokenizer here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mambacus.inference.long_text import encode_file
from mambacus.models import load_tokenizer
from mambacus.runtime.errors import UserError

WORDS = (
    "the",
    "apples",
    "12,345",
    "naïve",
    "東京",
    "🙂",
    "x" * 40,
    "\n",
    "\n\n",
    "\t",
    "  ",
    "½",
    "<|endoftext|>",
    "I'll",
)


def text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(("", " ", " ", "\r\n")) for _ in range(words))


def check(tokenizer: Any, path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    expected = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    for window, overlap in ((300, 64), (1000, 256), (1 << 16, 1 << 11)):
        assert encode_file(tokenizer, path, "--f", window, overlap).tolist() == expected, (window, overlap)


@pytest.mark.parametrize("name", ["tiny", "random:micro"])
def test_own_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(name)
    for seed in range(6):
        check(tokenizer, tmp_path / "t", text(seed, 700))


def test_the_published_tokenizer(data_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("random:130m", data_dir=data_dir)
    for seed in range(6):
        check(tokenizer, tmp_path / "t", text(seed, 700))


def test_a_tokenizer_that_puts_a_space_before_its_text(tmp_path: Path) -> None:
    """As SentencePiece's do: its first token is another one than that of the same word within a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator([text(1, 2000)], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    check(PreTrainedTokenizerFast(tokenizer_object=inner), tmp_path / "t", text(2, 700))


@pytest.mark.parametrize("whole", ["", "\n", "a", "a" * 5000, " " * 5000, "\n" * 3000, "1" * 4000])
def test_texts_without_a_place_to_cut(whole: str, tmp_path: Path) -> None:
    check(load_tokenizer("tiny"), tmp_path / "t", whole)


def test_faults_name_the_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("random:micro")
    with pytest.raises(UserError, match=r"--f .*gone: No such file"):
        encode_file(tokenizer, tmp_path / "gone", "--f")
    (tmp_path / "bytes").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"--f .*bytes: not UTF-8"):
        encode_file(tokenizer, tmp_path / "bytes", "--f")
