"""A model's signature: a few of its values, by which an adapter knows the model it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import write_json_atomic

SIGNATURE_FILE = "base_signature.json"

Signature = dict[str, list[float]]  # parameter name -> [middle element, *shape]


def signature(model: nn.Module) -> Signature:
    """Return the middle element and the shape of every parameter: cheap, and different for any two trained models.

    Values and not a hash, so that the same base loaded in bfloat16 is still known. No adapter may be attached.
    """
    return {
        name: [parameter.detach().flatten()[parameter.numel() // 2].float().item(), *parameter.shape]
        for name, parameter in model.named_parameters()
    }


def write_signature(folder: Path, values: Signature) -> None:
    """Write ``values`` beside an adapter."""
    write_json_atomic(folder / SIGNATURE_FILE, values)


def other_base(folder: Path, model: nn.Module) -> str | None:
    """Compare the signature beside an adapter with ``model``.

    Returns:
        None if they agree or if the adapter, made by other software, has none; else one clause naming the first
        parameter that differs.

    Raises:
        UserError: the file is not readable.
    """
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        return None
    try:
        return mismatch(json.loads(path.read_text(encoding="utf-8")), model)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: not a signature of a model") from None


def mismatch(stored: Signature, model: nn.Module) -> str | None:
    """Compare a stored signature with ``model``.

    Returns:
        None if they agree, else one clause naming the first parameter that differs.

    Raises:
        ValueError, TypeError, AttributeError: ``stored`` is not what `signature` returned.
    """
    expected = {name: (float(value), [int(size) for size in shape]) for name, (value, *shape) in stored.items()}
    ours = dict(model.named_parameters())
    for name, (value, shape) in expected.items():
        if name not in ours:
            return f"it has no {name}"
        parameter = ours[name].detach()
        if list(parameter.shape) != shape:
            return f"{name} is {tuple(parameter.shape)}, expected {tuple(shape)}"
        here = parameter.flatten()[parameter.numel() // 2].float().item()
        if not abs(here - value) <= _rounding(parameter.dtype) * max(abs(value), 1e-4):
            return f"{name} has other values"
    return None


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative change of a float32 value that is stored in ``dtype``, with a margin of two."""
    return 1e-6 if dtype.itemsize >= 4 or not dtype.is_floating_point else 2 * torch.finfo(dtype).eps
