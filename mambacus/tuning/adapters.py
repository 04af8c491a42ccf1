"""What is trained: the table of methods, LoRA through ``peft``, and adapters on disk in PEFT's format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from mambacus.models.signature import Signature, write_signature
from mambacus.runtime.errors import UserError, suggest

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Size and place of an adapter.

    Attributes:
        rank: inner dimension r of ``B A``.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability that an input of the adapter is dropped.
        targets: last parts of the names of the modules that get one.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("in_proj", "out_proj")


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        attach: makes a float32 model ready: returns the module to train, with ``requires_grad`` set.
        saves: what a run leaves behind, an adapter or a whole model.
        rates: (parameters of the model below which it holds, learning rate), ascending.
        quiet_first: tells by name which tensors have a zero gradient at the first step by construction.
    """

    attach: Callable[[nn.Module, AdapterSettings], nn.Module]
    saves: Literal["adapter", "model"]
    rates: tuple[tuple[float, float], ...]
    quiet_first: Callable[[str], bool] = lambda name: False

    def learning_rate(self, parameters: int) -> float:
        """Return the default peak rate for a model of that many parameters."""
        return next(rate for below, rate in self.rates if parameters < below)


def attach_lora(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """Wrap ``model`` with LoRA (Hu et al. 2021, arXiv 2106.09685) on the target modules; everything else is frozen.

    The default place, ``in_proj`` and ``out_proj``, is where Galim et al. (2025, arXiv 2410.09016) and MambaPEFT (2025,
    arXiv 2411.03855) find LoRA on Mamba to work best.

    Raises:
        UserError: a target names no module, or one that LoRA cannot wrap here.
    """
    from peft import LoraConfig, get_peft_model

    from mambacus.tuning.lora import TrainedLoraLinear

    check_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: TrainedLoraLinear})
    with silent_about_ties():
        return get_peft_model(model, config)


@contextlib.contextmanager
def silent_about_ties() -> Iterator[None]:
    """Silence PEFT's warning that merging an adapter on a tied matrix goes wrong: ``mambacus merge`` unties it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model (has|with) `tie_word_embeddings=True`")
        yield


def attach_full(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """Make every parameter of ``model`` trainable."""
    return model.requires_grad_(True)


def _multiplied_by_zero(name: str) -> bool:
    """Of LoRA's two matrices, the one whose partner starts at zero: A on a linear layer, B on an embedding."""
    return ".lora_A." in name or ".lora_embedding_B." in name


METHODS: dict[str, Method] = {
    "lora": Method(attach_lora, "adapter", ((250e6, 1e-3), (1e9, 5e-4), (float("inf"), 3e-4)), _multiplied_by_zero),
    "full": Method(attach_full, "model", ((500e6, 1e-4), (float("inf"), 3e-5))),
}


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        UserError: there is none, with a suggestion.
    """
    if name not in METHODS:
        raise UserError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}{suggest(name, METHODS)}")
    return METHODS[name]


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Check that every target names at least one linear or embedding module of ``model``.

    Raises:
        UserError: naming all wrong targets and the modules that exist.
    """
    kinds: dict[str, type[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            kinds[name.rpartition(".")[2]] = type(module)
    possible = sorted(name for name, kind in kinds.items() if not issubclass(kind, nn.Conv1d))
    if not targets:
        raise UserError(f"--targets: expected at least one of {', '.join(possible)}")
    faults = [
        f"{target!r} {'is a convolution' if target in kinds else 'matches no module'}{suggest(target, possible)}"
        for target in targets
        if target not in possible
    ]
    if faults:
        raise UserError(f"--targets: {', '.join(faults)}; LoRA can go on {', '.join(possible)}")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return ``{"trainable": n, "total": n}``; a tied matrix counts once."""
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def save_adapter(model: nn.Module, folder: Path, *, base_model: str, base_signature: Signature) -> None:
    """Write the adapter of a ``PeftModel`` in PEFT's format, with the signature of the model it belongs to.

    The folder appears whole or not at all.

    Args:
        model: what `attach_lora` returned.
        folder: must not exist yet.
        base_model: name or folder under which the base model is loaded.
        base_signature: `mambacus.models.signature.signature` of the base before the adapter was attached.

    Raises:
        UserError: it cannot be written.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel, got a {type(model).__name__}")
    config: Any = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    config.base_model_name_or_path = base_model
    config.target_modules = sorted(config.target_modules)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    staging = folder.with_name(f".{folder.name}.being-written")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        config.save_pretrained(str(staging))
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, staging / ADAPTER_WEIGHTS)
        write_signature(staging, base_signature)
        os.replace(staging, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {' '.join(str(error).split())}") from error


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says of itself.

    Attributes:
        path: the folder.
        base_model: name under which its base is loaded, "" if it does not say.
        targets: the modules it adapts.
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
        targets = config.get("target_modules") or ()
    except (ValueError, AttributeError):
        raise UserError(f"--adapter {folder}: {ADAPTER_CONFIG} is not valid JSON") from None
    return AdapterFolder(
        path=folder,
        base_model=str(config.get("base_model_name_or_path") or ""),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
    )
