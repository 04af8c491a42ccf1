"""Models on disk: the Hugging Face format, the original ``state-spaces`` format, and what can be wrong with either."""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.models.config import MambaConfig
from mambacus.models.mamba import MambaLM, keeps_float32
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_json, write_json_atomic

FORMATS = ("hf", "original")
CONFIG_FILE = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_HEAD, _EMBEDDINGS, _ORIGINAL_EMBEDDINGS = (
    "lm_head.weight",
    "backbone.embeddings.weight",
    "backbone.embedding.weight",
)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    format: str = "hf",  # the word of the command line
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model, and the tokenizer beside it, into a folder.

    Every file is written whole or not at all and ``config.json`` comes last, so that a folder left by a kill is not
    taken for a model.

    Args:
        model: a `MambaLM` without adapters; each parameter is written in its own dtype.
        folder: made if need be; it must not hold a model yet.
        tokenizer: a transformers tokenizer, or None.
        format: ``hf`` loads in transformers' ``MambaForCausalLM``, ``original`` in the authors' ``mamba_ssm``.
        max_shard_bytes: largest safetensors file; more parameters are spread over several files and an index.

    Raises:
        UserError: unknown format, a folder that holds a model, adapters in the model, a disk that is full.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(model, MambaLM):
        raise UserError(f"save: expected a MambaLM, got a {type(model).__name__}; merge adapters first")
    if model.quantisation is not None:
        raise UserError(f"save: the model's weights are {model.quantisation.format}; save the model they came from")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    foreign = sorted(set(tensors) - set(_expected(model.config)))
    if foreign:
        raise UserError(f"save: the model has adapters ({foreign[0]}, {len(foreign)} in all); merge them first")
    present = [name for name in (CONFIG_FILE, _SINGLE, _INDEX, _PICKLED) if (folder / name).exists()]
    if present:
        raise UserError(f"{folder}: holds a model already ({', '.join(present)}); choose another folder")
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config.to_hf(dtype) if format == "hf" else model.config.to_original()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None
    if format == "hf":
        _write_safetensors(folder, tensors, max_shard_bytes)
    else:
        names = {_ORIGINAL_EMBEDDINGS if name == _EMBEDDINGS else name: t.cpu() for name, t in tensors.items()}
        names.setdefault(_HEAD, names[_ORIGINAL_EMBEDDINGS])  # that code wants the key of a tied head too
        _write_atomic(folder / _PICKLED, lambda path: torch.save(names, path))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json_atomic(folder / CONFIG_FILE, config)


def read_config(folder: Path) -> MambaConfig:
    """Read the ``config.json`` of a model folder, of either format.

    Raises:
        UserError: the file is missing, not JSON, or not of a model we can run.
    """
    return MambaConfig.from_json(read_json(config_file(folder)), str(folder / CONFIG_FILE))


def config_file(folder: Path) -> Path:
    """Return the ``config.json`` of a model folder.

    Raises:
        UserError: there is none; if the folder is another of ours, the message says what to give instead.
    """
    path = folder / CONFIG_FILE
    if path.is_file():
        return path
    hint = ""
    if (folder / "adapter_config.json").is_file():
        hint = "; it is an adapter: give its base model, and this as --adapter"
    elif (folder / "adapter" / "adapter_config.json").is_file():
        hint = f"; it is a fine-tuning run: merge it, or give its base model and --adapter {folder / 'adapter'}"
    elif (folder / "model" / CONFIG_FILE).is_file():
        hint = f"; the model is in {folder / 'model'}"
    raise UserError(f"{folder}: not a model folder, it has no {CONFIG_FILE}{hint}")


def load_checkpoint(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> MambaLM:
    """Read a model folder: any config format with any weight file.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, its sharded form, or ``pytorch_model.bin`` (read with
            ``weights_only=True``: no code in it is run).
        device: where the parameters go.
        dtype: dtype of the parameters, None for that of the stored embeddings. ``A_log``, ``D`` and ``dt_proj.bias``
            are at least float32.

    Raises:
        UserError: a file is missing or corrupt; a parameter is missing, unknown, of another shape, or holds NaN or
            infinity (all are named).
    """
    config = read_config(folder)
    stored = {
        _EMBEDDINGS if name == _ORIGINAL_EMBEDDINGS else name: tensor for name, tensor in _read_tensors(folder).items()
    }
    if config.tie_embeddings and _HEAD in stored:
        head = stored.pop(_HEAD)
        if _EMBEDDINGS in stored and not torch.equal(head, stored[_EMBEDDINGS]):
            raise UserError(
                f"{folder}: {CONFIG_FILE} ties {_HEAD} to {_EMBEDDINGS}, but the stored values differ; "
                f"set tie_word_embeddings (tie_embeddings) to false if the head is its own"
            )
    with torch.device("meta"):
        model = MambaLM(config)
    _check_parameters(stored, {name: parameter.shape for name, parameter in model.named_parameters()}, folder)
    dtype = dtype or stored[_EMBEDDINGS].dtype
    wide = torch.promote_types(dtype, torch.float32)
    for name in list(stored):
        stored[name] = stored[name].to(device, wide if keeps_float32(name) else dtype)
    model.load_state_dict(stored, strict=False, assign=True)
    model.tie_weights()
    return model


def _expected(config: MambaConfig) -> dict[str, torch.Size]:
    """Return name and shape of every parameter, without a tied head."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MambaLM(config).named_parameters()}


def _check_parameters(stored: dict[str, Tensor], expected: dict[str, torch.Size], folder: Path) -> None:
    faults = []
    for what, names in (
        ("missing", [name for name in expected if name not in stored]),
        ("unknown", [name for name in stored if name not in expected]),
        ("not floating point", [name for name in expected if name in stored and not stored[name].is_floating_point()]),
        ("with NaN or infinity", [name for name in expected if name in stored and not _is_finite(stored[name])]),
        (
            "of another shape",
            [
                f"{name} (expected {tuple(shape)}, got {tuple(stored[name].shape)})"
                for name, shape in expected.items()
                if name in stored and stored[name].shape != shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{len(names)} {what}: {', '.join(names[:3])}{more}")
    if faults:
        raise UserError(f"{folder}: the parameters do not fit {CONFIG_FILE}; {'; '.join(faults)}")


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite; no finite float32 value can make a sum in float64 infinite."""
    return not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float64))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all stored tensors of a folder to the CPU."""
    for single, index, read in (
        (_SINGLE, _INDEX, _read_safetensors),
        (_PICKLED, _PICKLED_INDEX, _read_pickled),
    ):
        if (folder / single).is_file():
            return read(folder / single)
        if (folder / index).is_file():
            return _read_shards(folder, folder / index, read)
    raise UserError(f"{folder}: no weights: expected {_SINGLE}, {_INDEX} or {_PICKLED}")


def _read_shards(folder: Path, index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: expected a 'weight_map' from parameter names to file names")
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: {index.name} names {len(files)} files, missing {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read(folder / name)
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise UserError(f"{folder}: {index.name} promises {lost[0]} in {weight_map[lost[0]]}, which does not hold it")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: corrupt or truncated safetensors file ({error}){pointer_hint(path)}") from None


def pointer_hint(path: Path) -> str:
    """Return what to do if ``path`` is not the file but Git LFS's note about it, else an empty string."""
    with open(path, "rb") as file:
        is_pointer = file.read(24) == b"version https://git-lfs."
    return "; it is a pointer of Git LFS, fetch the file itself with git lfs pull" if is_pointer else ""


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol; what matters is raised
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: corrupt, or it holds more than tensors, which could run code and is not loaded"
            f"{pointer_hint(path)}"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:  # a cut zip file can raise any of these
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: corrupt, truncated or unreadable ({' '.join(reason.split())})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors, got something else")
    return tensors


def _write_safetensors(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    def write(name: str, part: dict[str, Tensor]) -> None:
        tensors_here = {key: tensor.cpu().contiguous() for key, tensor in part.items()}
        _write_atomic(folder / name, lambda path: save_file(tensors_here, path, metadata={"format": "pt"}))

    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        write(_SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json_atomic(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Cut ``tensors`` into consecutive groups of at most ``max_bytes``, or of one larger tensor."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file and move it to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    from safetensors import SafetensorError

    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes files for the owner alone
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error
