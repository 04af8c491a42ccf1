"""Names of models: ``tiny``, a folder, a hub id, ``random:130m``, and how each becomes a model and a tokenizer."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from mambacus.models.adapters import adapter_folder, attach_adapter
from mambacus.models.checkpoint import CONFIG_FILE, config_file, load_checkpoint, read_config
from mambacus.models.config import MambaConfig
from mambacus.models.hub import hub_folder
from mambacus.models.mamba import MambaLM
from mambacus.models.quantised import check_format, quantise_and_measure
from mambacus.models.tokenizer import byte_tokenizer, folder_tokenizer, neox_tokenizer, tokenizer_file
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import read_json

_NEOX_VOCABULARY = 50280  # rows of the embedding: 50277 tokens, rounded up to a multiple of 8


def _published(d_model: int, n_layer: int) -> MambaConfig:
    return MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277, pad_vocab_size_multiple=8)


RANDOM_SIZES = {
    "micro": MambaConfig(d_model=64, n_layer=2, vocab_size=512),
    "tiny": MambaConfig(d_model=256, n_layer=8, vocab_size=4096),
    "130m": _published(768, 24),
    "370m": _published(1024, 48),
    "790m": _published(1536, 48),
    "1.4b": _published(2048, 48),
    "2.8b": _published(2560, 64),
}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "merges.txt"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a name leads.

    Attributes:
        name: as the user gave it.
        folder: the model folder, None for a random model.
        size: the random model's size, None for a folder.
    """

    name: str
    folder: Path | None = None
    size: str | None = None


def load(
    name: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    adapter: str | os.PathLike[str] | None = None,
    *,
    weights: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> tuple[MambaLM, Any]:
    """Load a Mamba model and its tokenizer.

    Args:
        name: ``tiny`` (shipped with the package), a model folder of either format, a hub id, or ``random:SIZE`` with
            SIZE micro, tiny, 130m, 370m, 790m, 1.4b or 2.8b (published shapes, fresh parameters).
        device: where the model goes.
        dtype: dtype of the weights, None for the stored one; ``A_log``, ``D`` and ``dt_proj.bias`` stay float32.
        adapter: folder of a PEFT adapter to attach, or the fine-tuning run that holds it; the model is then a
            ``peft.PeftModel`` around the `MambaLM`.
        weights: ``int8`` or ``int4`` to quantise the large matrices (on a CPU, without an adapter); the model's
            ``quantisation`` says what it costs in perplexity, which is measured here, in the time of reading 2500
            tokens, and printed on standard error.
        tokenizer: folder or ``tokenizer.json`` to use instead of the model's own.
        data_dir: data folder in which the GPT-NeoX tokenizer may lie (default: ``$MAMBACUS_DATA_DIR``).
        backend: backend of the ops: ``auto``, ``reference``, ``cpu`` or ``triton``.
        seed: seed of a random model; the same seed gives the same parameters on every device.

    Returns:
        The model in evaluation mode, and the tokenizer: the given one; that of the folder; the GPT-NeoX tokenizer for
        models of its vocabulary without one of their own (a random one has None if it is not on this machine); one
        token a byte for ``random:micro`` and ``random:tiny``.

    Raises:
        UserError: no such model, hub not reachable, broken files, an adapter for another model, no tokenizer, weights
            that cannot be quantised.
    """
    if weights is not None:
        check_format(weights, torch.device(device))
        if adapter is not None:
            raise UserError(f"weights {weights}: cannot be quantised under an adapter; merge it first, then load that")
    source = resolve(name)
    folder = None if adapter is None else adapter_folder(Path(adapter))
    found = load_tokenizer(source, tokenizer=tokenizer, data_dir=data_dir)  # first: it is quick to fail
    if source.folder is not None:
        model = load_checkpoint(source.folder, device, dtype)
    else:
        model = random_model(load_config(source), seed).to(device, dtype or torch.float32)
    model.name_or_path = source.name
    model.set_backend(backend)
    if folder is not None:
        model = attach_adapter(model, folder)
    model.eval()
    if weights is not None:
        print(quantise_and_measure(model, found, weights), file=sys.stderr)
    return model, found


def random_model(config: MambaConfig, seed: int = 0, device: torch.device | None = None) -> MambaLM:
    """Return a model with fresh float32 parameters; torch's global generators are left as they were.

    Args:
        config: its shape.
        seed: of the numbers.
        device: where they are drawn, the CPU by default. A GPU draws other numbers, and a large model's far sooner.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
        torch.manual_seed(seed)
        return MambaLM(config)


def load_config(name: str | os.PathLike[str] | Source) -> MambaConfig:
    """Return the configuration of a Mamba model without reading its weights.

    Raises:
        UserError: as `load`.
    """
    source = name if isinstance(name, Source) else resolve(name, weights=False)
    if source.folder is not None:
        return read_config(source.folder)
    return RANDOM_SIZES[source.size or ""]


def load_tokenizer(
    name: str | os.PathLike[str] | Source,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Return the tokenizer that `load` would return.

    Raises:
        UserError: as `load`.
    """
    if tokenizer is not None:
        return tokenizer_file(Path(tokenizer))
    source = name if isinstance(name, Source) else resolve(name, weights=False)
    data_dir = Path(data_dir) if data_dir is not None else None
    if source.size is not None:
        if RANDOM_SIZES[source.size].padded_vocab_size != _NEOX_VOCABULARY:
            return byte_tokenizer()
        return neox_tokenizer(data_dir, online=False)
    assert source.folder is not None
    own = folder_tokenizer(source.folder)
    if own is not None:
        return own
    rows = read_config(source.folder).padded_vocab_size
    neox = neox_tokenizer(data_dir, online=True) if rows == _NEOX_VOCABULARY else None
    if neox is None:
        raise UserError(
            f"{source.name}: no tokenizer beside the model; give --tokenizer FOLDER, or for a model with the GPT-NeoX "
            "vocabulary --data-dir DIR with tokenizer/20B_tokenizer.json"
        )
    return neox


def model_type(name: str | os.PathLike[str]) -> str:
    """Return the architecture behind a name: ``mamba`` for all that `load` takes, else its config's ``model_type``.

    Raises:
        UserError: no such model or no readable config.
    """
    source = resolve(name, weights=False)
    if source.folder is None:
        return "mamba"
    path = config_file(source.folder)
    found = read_json(path).get("model_type", "mamba")
    if not isinstance(found, str) or not found:
        raise UserError(f"{path}: model_type: expected the name of an architecture, got {found!r}")
    return found


def resolve(name: str | os.PathLike[str], *, weights: bool = True) -> Source:
    """Find what a name means; a hub id is downloaded into the hub's cache.

    Args:
        name: as in `load`.
        weights: fetch the weights of a hub id too, not only configuration and tokenizer.

    Raises:
        UserError: it means nothing; the message says what was tried.
    """
    text = os.fspath(name)
    if not text:
        raise UserError("model: expected tiny, a folder, a hub id or random:SIZE, got an empty name")
    if text.startswith("random:"):
        size = text.removeprefix("random:").lower()
        if size not in RANDOM_SIZES:
            raise UserError(
                f"model {text!r}: expected random:SIZE with SIZE {', '.join(RANDOM_SIZES)}{suggest(size, RANDOM_SIZES)}"
            )
        return Source(text, size=size)
    if text == "tiny":
        folder = Path(str(importlib.resources.files("mambacus.data"))) / "tiny"
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"model 'tiny': not in this installation (no {folder / CONFIG_FILE})")
        return Source(text, folder=folder)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(text, folder=folder)
    if folder.exists():
        raise UserError(f"model {text!r}: expected a folder, got a file")
    if not is_hub_id(text):
        raise UserError(f"model {text!r}: no such folder")
    return Source(text, folder=_download(text, weights))


def is_hub_id(name: str) -> bool:
    """Return whether a name that is no folder could be a model of the hub."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def _download(hub_id: str, weights: bool) -> Path:
    """Return the local snapshot of a hub model; pickled weights are fetched only where there are no others."""
    small = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"]
    folder = hub_folder(hub_id, small)
    if isinstance(folder, Path) and weights and not any(folder.glob("*.safetensors")):
        folder = hub_folder(hub_id, [*small, "pytorch_model*.bin"])
    if isinstance(folder, str):
        raise UserError(
            f"model {hub_id!r}: no such folder, and not to be had from the model hub ({folder})"
            f"{suggest(hub_id, ['tiny', *(f'random:{size}' for size in RANDOM_SIZES)])}"
        )
    return folder
