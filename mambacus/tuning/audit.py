"""Proof that a run trains what it says it trains: no gradient, no movement or no finite number stops it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mambacus.runtime.errors import UserError
from mambacus.tuning import processes, sharding


class TrainingStoppedError(UserError):
    """Training was stopped because it would not have done what was asked; the message names the tensor or module."""


class GradientAudit(TrainerCallback):
    """Checks gradients before each update and, over the first two updates, that every trainable tensor takes part.

    At the first update every tensor has a finite gradient that is not zero, except those for which ``quiet_first``
    holds: with LoRA's B at zero, A has a zero gradient until B has moved. At the second update there is no exception,
    and after it every tensor has changed. From then on gradients must stay finite. A resumed run is audited anew,
    without exceptions.

    Of a model that is shared out over processes, each looks at its part and all come to the same verdict.

    Args:
        model: its parameters that require a gradient are audited.
        quiet_first: tells by name which tensors start with a zero gradient by construction.

    Attributes:
        parameters: what is audited, by name.
        norms: of this process's parts of the gradients of the last step, in that order, after clipping.
    """

    def __init__(self, model: nn.Module, quiet_first: Callable[[str], bool]) -> None:
        self.model = model
        self.parameters: dict[str, nn.Parameter] = {}
        self.quiet_first = quiet_first
        self.norms: torch.Tensor | None = None
        self._updates = 0
        self._before: torch.Tensor | None = None

    @property
    def settled(self) -> bool:
        """Whether the first two updates have been checked."""
        return self._updates >= 2

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the tensors, which are others since the model was shared out, if the run was launched so."""
        if processes.is_sharded() != sharding.is_shared_out(self.model):
            raise TrainingStoppedError("launched with FSDP, but accelerate did not shard the model")
        self.parameters = trainable(self.model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients that the optimiser is about to use."""
        self._updates += 1
        step = state.global_step + 1
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if len(gradients) < len(self.parameters):
            missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
            raise TrainingStoppedError(f"step {step}: no gradient reaches {listed(missing)}: it would never train")
        self.norms = norms = torch.stack(torch._foreach_norm([sharding.part(gradient) for gradient in gradients]))
        infinite, nonzero = self._anywhere(~norms.isfinite(), norms != 0)
        broken = [name for name, bad in zip(self.parameters, infinite, strict=True) if bad]
        if broken:
            raise TrainingStoppedError(
                f"step {step}: the gradient is not finite in {listed(broken)}; a lower --lr may help"
            )
        if self._updates > 2:
            return
        first = state.global_step == 0
        zero = [
            name
            for name, moves in zip(self.parameters, nonzero, strict=True)
            if not moves and not (first and self.quiet_first(name))
        ]
        if zero:
            raise TrainingStoppedError(f"step {step}: the gradient is zero in {listed(zero)}: it would never train")
        if self._updates == 1:
            self._before = self._checksums()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the second update, check that every tensor has changed."""
        if self._updates != 2 or self._before is None:
            return
        (moved,) = self._anywhere(self._checksums() != self._before)
        self._before = None
        still = [name for name, changed in zip(self.parameters, moved, strict=True) if not changed]
        if still:
            raise TrainingStoppedError(f"step {state.global_step + 1}: two updates did not change {listed(still)}")

    def _checksums(self) -> torch.Tensor:
        """Return the checksum of this process's part of each tensor."""
        return checksums(sharding.part(parameter) for parameter in self.parameters.values())

    def _anywhere(self, *flags: torch.Tensor) -> list[list[bool]]:
        """Return ``flags``, one for each tensor, as they are for the whole tensors."""
        together = torch.stack(flags)
        found: list[list[bool]] = (sharding.anywhere(together) if processes.is_sharded() else together).tolist()
        return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checksums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return one int64 per tensor that changes when any of its bits does (up to collisions); costs no copy."""
    sums = []
    for tensor in tensors:
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        sums.append(tensor.detach().contiguous().flatten().view(words).sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


class FrozenCheck:
    """Remembers the bits of all frozen tensors, buffers included, and proves later that none has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._before = self._checksums(model)

    def verify(self, model: nn.Module) -> None:
        """Compare with the model as it is now, which may have been shared out over processes since.

        Raises:
            TrainingStoppedError: naming the frozen tensors that training has changed.
        """
        after = self._checksums(model)
        changed = [name for name, before in self._before.items() if after[name] != before]
        if changed:
            raise TrainingStoppedError(f"training changed what is frozen: {listed(changed)}")

    @staticmethod
    def _checksums(model: nn.Module) -> dict[str, int]:
        frozen = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if not tensor.requires_grad and not tensor.is_complex()
        }
        sums = checksums(sharding.whole(tensor.detach()) for tensor in frozen.values())
        return dict(zip(frozen, sums.tolist(), strict=True))


def first_bad_module(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run ``forward`` once more and name the place where the first number that is not finite appears.

    Returns:
        The name of the module whose output is bad though its inputs were good; or, if a module is handed bad inputs
        that no module returned, ``"<parent>, before <module>"``.
    """
    found: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not found and _is_bad((args, kwargs)):
                parent, _, own = name.rpartition(".")
                found.append(f"{parent or 'the model'}, before {own}")

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and _is_bad(output):
                found.append(name or "the model")

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no module (a second pass was finite)"


def _is_bad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not bool(value.isfinite().all())
    if isinstance(value, dict):
        return any(_is_bad(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_bad(item) for item in value)
    return any(_is_bad(item) for item in vars(value).values()) if hasattr(value, "__dataclass_fields__") else False


def listed(names: list[str]) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
