"""Frozen projections in bfloat16 while a GPU trains under autocast: what autocast makes of them, made once.

Under autocast each product casts its float32 weight, forwards and backwards. What is not trained gives the same numbers
every time, so they are held in its place, at half the memory, and the originals wait on the CPU. Only weights that
nothing but such a product reads: no embedding or head tied to it, no norm, ``A_log``, ``D`` or bias, and no base layer
of an adapter that computes with the weight itself, as DoRA does.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mambacus.ops import Linear
from mambacus.tuning import processes
from mambacus.tuning.audit import TrainingStoppedError, listed
from mambacus.tuning.graphs import Choice


def choose(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Choice:
    """Choose whether `FrozenWeights` is used in training ``model`` on ``device``, products in ``autocast`` if any."""
    if device.type != "cuda":
        return Choice(False, f"not a GPU but {device.type}")
    if autocast is not torch.bfloat16:
        return Choice(False, "no autocast to bfloat16")
    if processes.is_sharded():
        return Choice(False, "FSDP shares the weights out as they are")
    if not castable(model):
        return Choice(False, "no frozen weight is read by matrix products alone")
    return Choice(True, "read by matrix products under autocast alone")


def castable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen float32 weights of ``model`` that nothing but a product under autocast reads, by name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    read_otherwise: set[int] = set()
    apart = _read_by_adapters(model)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, Linear) and name == "weight" and module not in apart:
                found[id(parameter)] = (f"{path}.{name}", parameter)
            else:
                read_otherwise.add(id(parameter))
    return {
        name: parameter
        for key, (name, parameter) in found.items()
        if key not in read_otherwise and not parameter.requires_grad and parameter.dtype == torch.float32
    }


def _read_by_adapters(model: nn.Module) -> set[nn.Module]:
    """Return the modules inside PEFT's layers, but those of plain LoRA, which calls its base or multiplies alike."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {
        inner
        for layer in layers
        if not (isinstance(layer, PeftLinear) and not layer.lora_variant)
        for inner in layer.modules()
    }


class FrozenWeights:
    """Context in which the weights of `castable` are bfloat16; leaving it puts the originals back, bit for bit.

    Nothing else may change them inside: that is checked on leaving, since the originals would hide it.

    Args:
        model: its parameters stay the same objects.

    Attributes:
        facts: ``tensors`` and ``bytes_saved``, of the memory of the model's device.

    Memory:
        Inside, half of these weights' bytes on their device and all of them on the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = castable(model)
        self._originals: dict[str, Tensor] = {}
        self.facts = {
            "tensors": len(self._weights),
            "bytes_saved": sum(weight.nbytes for weight in self._weights.values()) // 2,
        }

    def __enter__(self) -> Self:
        """Cast, one weight after the other."""
        try:
            for name, weight in self._weights.items():
                original = weight.detach().to("cpu", copy=True)
                weight.data = weight.detach().to(torch.bfloat16)
                self._originals[name] = original
        except BaseException:
            self._put_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Put the originals back, also after an error.

        Raises:
            TrainingStoppedError: a weight was changed inside; not after another error.
        """
        changed = self._put_back()
        if changed and kind is None:
            raise TrainingStoppedError(f"training changed what is frozen: {listed(changed)}")

    def _put_back(self) -> list[str]:
        """Put back what was cast; return the names of those that are no longer what the original is cast to."""
        changed = []
        for name in list(self._originals):
            weight, original = self._weights[name], self._originals.pop(name)
            held, whole = weight.detach(), original.to(weight.device)
            weight.data = whole
            if not torch.equal(held.view(torch.int16), whole.to(torch.bfloat16).view(torch.int16)):
                changed.append(name)
        return changed
