"""The tokenizer that belongs to a model: beside it, the published models' own, or plain bytes for random ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mambacus.models.hub import hub_folder
from mambacus.runtime.errors import UserError

NEOX_HUB_ID = "EleutherAI/gpt-neox-20b"
_NEOX_FILE = Path("tokenizer") / "20B_tokenizer.json"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_END = "<|endoftext|>"


def folder_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer of a model folder, None if it has none.

    Raises:
        UserError: its files cannot be read.
    """
    if not any((folder / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer would take the class of a Mamba config, GPT-NeoX, whatever tokenizer.json says.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 -- the Rust parser of tokenizer.json raises bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())})") from None


def neox_tokenizer(data_dir: Path | None = None, *, online: bool) -> Any | None:
    """Return the GPT-NeoX tokenizer, which the published Mamba and Pythia models use; None if it is nowhere.

    Looked for as ``tokenizer/20B_tokenizer.json`` under ``data_dir`` (or ``$MAMBACUS_DATA_DIR``), then in the hub's
    cache on this machine, and, if ``online``, on the hub.
    """
    given = data_dir or os.environ.get("MAMBACUS_DATA_DIR")
    if given and (Path(given) / _NEOX_FILE).is_file():
        return tokenizer_file(Path(given) / _NEOX_FILE)
    folder = hub_folder(NEOX_HUB_ID, ["tokenizer*.json", "special_tokens_map.json"], online=online)
    return None if isinstance(folder, str) else folder_tokenizer(folder)


def tokenizer_file(path: Path) -> Any:
    """Return the tokenizer of a folder, or of a ``tokenizer.json`` with the special tokens of GPT-NeoX.

    Raises:
        UserError: there is none at ``path``, or it cannot be read.
    """
    if path.is_dir():
        tokenizer = folder_tokenizer(path)
        if tokenizer is None:
            raise UserError(f"{path}: no tokenizer: expected one of {', '.join(_FILES)}")
        return tokenizer
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: expected a folder or a tokenizer.json")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # noqa: BLE001 -- the Rust parser raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())})") from None
    vocabulary = tokenizer.get_vocab()
    for role, token in (("eos_token", _END), ("bos_token", _END), ("unk_token", _END), ("pad_token", "<|padding|>")):
        if token in vocabulary:
            setattr(tokenizer, role, token)
    return tokenizer


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte and ``<|endoftext|>`` as 0: 257 tokens, any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {_END: 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, bos_token=_END, pad_token=_END)
