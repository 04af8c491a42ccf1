"""Attaching a PEFT adapter to a model, with the checks that PEFT leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mambacus.models.checkpoint import pointer_hint
from mambacus.models.mamba import CausalConv1d, MambaLM
from mambacus.models.signature import other_base
from mambacus.models.ssm_adapters import PEFT_TYPE, attach
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach_adapter(model: MambaLM, folder: Path) -> Any:
    """Wrap ``model`` with the adapter in ``folder``.

    PEFT loads what fits and says little about the rest; here every stored tensor must find its place and every place
    must be filled.

    Returns:
        A ``peft.PeftModel``, for inference; ``model`` itself, changed in place, for an adapter of
        `mambacus.models.ssm_adapters`.

    Raises:
        UserError: no adapter there, corrupt files, or an adapter made for another model; the message names both.
    """
    import safetensors
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    from mambacus.models.conv_lora import CausalConvLora

    base = check_adapter_folder(folder)
    if read_json(folder / _CONFIG)["peft_type"] == PEFT_TYPE:
        return _attach_ssm(model, folder, base)
    try:
        with safetensors.safe_open(folder / _WEIGHTS, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- no dict
        misplaced = _misplaced(model, stored) or other_base(folder, model)
        if misplaced:
            raise _another_model(folder, base, model, misplaced)
        config = PeftConfig.from_pretrained(str(folder))
        if hasattr(config, "_register_custom_module"):
            config._register_custom_module({CausalConv1d: CausalConvLora})
        wrapped = PeftModel.from_pretrained(model, folder, config=config)
    except safetensors.SafetensorError as error:
        raise UserError(f"--adapter {folder}: corrupt {_WEIGHTS} ({error}){pointer_hint(folder / _WEIGHTS)}") from None
    except (ValueError, RuntimeError, KeyError, TypeError) as error:  # all that PEFT raises for what does not fit
        raise _another_model(folder, base, model, " ".join(str(error).split())[:300]) from None
    places = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # "auto" would ask the hub
    wanted = {name: tuple(tensor.shape) for name, tensor in places.items()}
    for name in sorted(wanted.keys() ^ stored.keys()):
        where = "missing in the adapter" if name in wanted else "without a place in the model"
        raise _another_model(folder, base, model, f"{name} is {where}")
    return wrapped


def _attach_ssm(model: MambaLM, folder: Path, base: str) -> MambaLM:
    import safetensors.torch

    config = read_json(folder / _CONFIG)
    try:
        stored = safetensors.torch.load_file(folder / _WEIGHTS, device=str(model.device))
    except safetensors.SafetensorError as error:
        raise UserError(f"--adapter {folder}: corrupt {_WEIGHTS} ({error}){pointer_hint(folder / _WEIGHTS)}") from None
    misplaced = other_base(folder, model)
    if misplaced:
        raise _another_model(folder, base, model, misplaced)
    if not isinstance(config.get("options"), dict) or not isinstance(config.get("method"), str):
        raise UserError(f"--adapter {folder}: {_CONFIG}: expected method (text) and options (an object)")
    learned = attach(model, config["method"], config["options"])
    for name in sorted(learned.keys() ^ stored.keys()):
        where = "missing in the adapter" if name in learned else "without a place in the model"
        raise _another_model(folder, base, model, f"{name} is {where}")
    for name, parameter in learned.items():
        if parameter.shape != stored[name].shape:
            shapes = f"{tuple(parameter.shape)} here, {tuple(stored[name].shape)} in the adapter"
            raise _another_model(folder, base, model, f"{name} is {shapes}")
        with torch.no_grad():
            parameter.copy_(stored[name])
    return model


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter, given it or the fine-tuning run that made it.

    Raises:
        UserError: as `check_adapter_folder`.
    """
    folder = path / "adapter" if (path / "adapter" / _CONFIG).is_file() else path
    check_adapter_folder(folder)
    return folder


def check_adapter_folder(folder: Path) -> str:
    """Return the name of the model that the adapter in ``folder`` was made for.

    Raises:
        UserError: the folder holds no PEFT adapter, or its configuration cannot be read.
    """
    if not folder.is_dir():
        what = "expected a PEFT adapter folder, got a file" if folder.exists() else "no such folder"
        raise UserError(f"--adapter {folder}: {what}")
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        tuned = any((folder / name).is_file() for name in ("config.json", "model/config.json"))
        hint = "; it holds a whole model, which is given as --model" if tuned else ""
        raise UserError(f"--adapter {folder}: expected a PEFT adapter folder, missing {', '.join(missing)}{hint}")
    config = read_json(folder / _CONFIG)
    if "peft_type" not in config:
        raise UserError(f"--adapter {folder}: {_CONFIG} is not a PEFT configuration (no 'peft_type')")
    return str(config.get("base_model_name_or_path") or "an unnamed model")


def _misplaced(model: nn.Module, stored: dict[str, tuple[int, ...]]) -> str | None:
    """Return one clause about the first LoRA matrix whose module is absent or of another width, None if all fit."""
    modules = dict(model.named_modules())
    for name, shape in stored.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        module = modules.get(path)
        if part and module is None:
            return f"it adapts {path}, which this model does not have"
        if not isinstance(module, nn.Linear) or part not in ("A.weight", "B.weight"):
            continue
        axis, expected = (1, module.in_features) if part == "A.weight" else (0, module.out_features)
        if shape[axis] != expected:
            side = "input" if axis == 1 else "output"
            return f"{path} has {side} width {expected} here, {shape[axis]} in the adapter"
    return None


def _another_model(folder: Path, base: str, model: MambaLM, detail: str) -> UserError:
    name = model.name_or_path or "the given model"
    return UserError(f"--adapter {folder}: made for {base}, does not fit {name}: {detail}")
