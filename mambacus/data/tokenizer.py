"""The tokenizer of the embedded model: byte-level BPE in which every digit stays a token of its own.

Single digits let a small model learn sums column by column; a space before a number is its own token too, so ``17`` is
spelled the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mambacus.runtime.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|padding|>"
EOS_ID, PAD_ID = 0, 1
MIN_VOCABULARY = 2 + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on ``texts``; special tokens are `EOS_TOKEN` (id 0) and `PAD_TOKEN` (id 1).

    Args:
        texts: the sample; memory grows with its distinct words.
        vocab_size: exact number of tokens, at least `MIN_VOCABULARY` (the 256 bytes and two special tokens).

    Raises:
        UserError: ``vocab_size`` is too small, or the sample too small to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCABULARY:
        raise UserError(f"--vocab-size: expected at least {MIN_VOCABULARY}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the text gives no more than {tokenizer.get_vocab_size()} tokens; lower it"
        )
    return tokenizer


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as transformers' fast tokenizer, with end-of-text and padding apart."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
