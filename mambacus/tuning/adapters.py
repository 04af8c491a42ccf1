"""Adapter folders: PEFT's two files and the signature of the model they belong to."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mambacus.models import MambaLM
from mambacus.models.signature import Signature, write_signature
from mambacus.models.ssm_adapters import PEFT_TYPE
from mambacus.runtime.errors import UserError
from mambacus.tuning.peft_methods import INIT_TENSORS, difference_as_lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base_model: str,
    base_signature: Signature,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapter of a model, in PEFT's format, with the signature of the model it belongs to.

    The folder appears whole or not at all.

    Args:
        model: what a `mambacus.tuning.methods.Method` attached an adapter to.
        folder: must not exist yet.
        base_model: name or folder under which the base model is loaded.
        base_signature: `mambacus.models.signature.signature` of the base before the adapter was attached.
        tensors: the adapter's entries of the state dict, if those of the model are shared out over processes.

    Raises:
        UserError: it cannot be written.
    """
    make = _ssm_files if isinstance(model, MambaLM) else _peft_files
    write = make(model, base_model, tensors)
    staging = folder.with_name(f".{folder.name}.being-written")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write(staging)
        write_signature(staging, base_signature)
        os.replace(staging, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {' '.join(str(error).split())}") from error


def _peft_files(model: nn.Module, base_model: str, given: dict[str, Tensor] | None) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a model with an adapter, got a {type(model).__name__}")
    config: Any = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    config.base_model_name_or_path = base_model
    config.target_modules = sorted(config.target_modules)
    tensors = get_peft_model_state_dict(model, given, save_embedding_layers=False)
    if hasattr(model, INIT_TENSORS):
        tensors = difference_as_lora(model, config, tensors)

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        _write_tensors(folder, tensors)

    return write


def _ssm_files(model: nn.Module, base_model: str, given: dict[str, Tensor] | None) -> Any:
    if not isinstance(model, MambaLM) or model.adapter is None:
        raise TypeError("expected a model with an adapter, got a plain MambaLM")
    tensors = {name: given[name] if given else p for name, p in model.named_parameters() if p.requires_grad}
    config = {
        "peft_type": PEFT_TYPE,
        "method": model.adapter.name,
        "options": model.adapter.options,
        "base_model_name_or_path": base_model,
        "task_type": "CAUSAL_LM",
    }

    def write(folder: Path) -> None:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_tensors(folder, tensors)

    return write


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, folder / ADAPTER_WEIGHTS)


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says of itself.

    Attributes:
        path: the folder.
        base_model: name under which its base is loaded, "" if it does not say.
        targets: the modules it adapts, or the method made for state spaces that chose them.
    """

    path: Path
    base_model: str
    targets: tuple[str, ...]


def read_adapter(path: Path) -> AdapterFolder:
    """Read the description of an adapter; ``path`` may also be the run that made it.

    Raises:
        UserError: no such folder, not an adapter, or a corrupt description.
    """
    folder = path / "adapter" if (path / "adapter" / ADAPTER_CONFIG).is_file() else path
    if not folder.is_dir():
        raise UserError(f"--adapter {path}: no such folder")
    if not (folder / ADAPTER_CONFIG).is_file():
        tuned = (path / "model" / "config.json").is_file()
        hint = "; it holds a fully tuned model, which needs no merge" if tuned else ""
        raise UserError(f"--adapter {path}: not an adapter, {ADAPTER_CONFIG} is missing{hint}")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        targets = config.get("target_modules") or config.get("method") or ()
    except (ValueError, AttributeError):
        raise UserError(f"--adapter {folder}: {ADAPTER_CONFIG} is not valid JSON") from None
    return AdapterFolder(
        path=folder,
        base_model=str(config.get("base_model_name_or_path") or ""),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
    )
