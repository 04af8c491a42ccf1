"""The passes of training as CUDA graphs: a forward and backward pass is recorded once for its shape and then repeated.

A layer is about a hundred launches, which take the CPU longer than the GPU. A graph repeats them all by one call, with
the addresses they had: inputs are copied into fixed memory, and gradients come out in fixed memory. The optimiser stays
outside. Random numbers (dropout) go on as without a graph: torch hands each repetition the generator's place.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError
from mambacus.runtime.graphs import Recorder
from mambacus.tuning import processes
from mambacus.tuning.peft_methods import base_of

CHOICES = ("auto", "on", "off")
LENGTH_STEP = 128  # tokens to which rows are filled up, so that few shapes are met
MOST_SHAPES = 8  # recorded; passes of further shapes run as they are
Batch = Mapping[str, Tensor]
Shape = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Whether something is done in training, such as recording passes, and the reason for it."""

    used: bool
    reason: str

    def facts(self, found: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the choice for the record, with what was ``found`` where it is used."""
        return {"used": self.used, "reason": self.reason} | dict(found or {})


def choose(wanted: str, model: nn.Module, device: torch.device) -> Choice:
    """Choose whether to record the passes of ``model``.

    Args:
        wanted: ``auto`` (where it is known to work), ``on`` or ``off``.
        model: a `MambaLM`, or what a method made of it.
        device: where it is trained.

    Raises:
        UserError: ``on`` where it cannot work.
    """
    if wanted == "off":
        return Choice(False, "--cuda-graph off")
    obstacle = _obstacle(model, device)
    if obstacle is not None:
        if wanted == "on":
            raise UserError(f"--cuda-graph on: {obstacle}")
        return Choice(False, obstacle)
    if wanted == "on":
        return Choice(True, "--cuda-graph on")
    untried = _untried(model)
    return Choice(False, f"{untried}; --cuda-graph on tries it") if untried else Choice(True, "a GPU and one process")


def _obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Return why passes cannot be recorded, or None if they can."""
    if device.type != "cuda":
        return f"there are no graphs on the device {device.type}"
    if processes.world_size() > 1:
        return "several processes exchange gradients during the backward pass"
    if base_of(model).gradient_checkpointing:
        return "--checkpointing reads the generator's place on the CPU"
    return None


def _untried(model: nn.Module) -> str | None:
    """Return what it is not known to work with, or None."""
    attached = base_of(model).adapter
    if attached is not None:
        return f"not tried with {attached.name}"
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA" or config.use_dora:
            return f"not tried with {'DoRA' if kind == 'LORA' else kind}"
    return None


@dataclasses.dataclass
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    loss: Tensor


class Passes:
    """Forward and backward passes that add to the gradients of ``parameters``, repeated from recordings.

    A shape's first pass runs as it is and its next one is recorded. The first recording *owns* the gradients: it writes
    them where there were none, at the beginning of a step. All others add to its memory, which is set to zero where
    they come first in a step.

    Args:
        run: does a batch's forward and backward pass; gives its loss, detached.
        model: the model that ``run`` calls; told while recording that shapes must not depend on values.
        parameters: what is trained.
        padding: value that fills up the rows of a matrix of the batch, by its name; what has none is not filled up.
        recorder: makes the recordings.

    Attributes:
        counts: passes that were ``repeated`` and that ran as they are (``direct``), and ``recorded`` graphs.
    """

    def __init__(
        self,
        run: Callable[[Batch], Tensor],
        model: MambaLM,
        parameters: Sequence[nn.Parameter],
        padding: Mapping[str, int],
        recorder: Recorder,
    ) -> None:
        self._run, self._model, self._parameters = run, model, list(parameters)
        self._padding, self._recorder = padding, recorder
        self._gradients: list[Tensor] = []  # the memory that recordings write and add to
        self._met: collections.Counter[Shape] = collections.Counter()
        self._recordings: dict[tuple[Shape, bool], _Recording] = {}  # by shape and whether it owns the gradients
        self.counts = {"recorded": 0, "repeated": 0, "direct": 0}

    def run(self, batch: Batch) -> Tensor:
        """Add the gradients of ``batch`` to those that are there; return its loss, detached."""
        shape = tuple((name, *self._filled(name, tensor)) for name, tensor in batch.items())
        self._met[shape] += 1
        begins = all(parameter.grad is None for parameter in self._parameters)
        if not self._takes(shape, begins):
            self.counts["direct"] += 1
            return self._run(batch)
        owns = begins and (not self._gradients or (shape, True) in self._recordings)
        if not owns:
            self._gather(begins)
        recording = self._recordings.get((shape, owns))
        if recording is None:
            recording = self._recordings[shape, owns] = self._record(batch, owns)
        self._fill(recording.inputs, batch)
        recording.replay()
        self._point()
        self.counts["repeated"] += 1
        return recording.loss.clone()

    def release(self) -> None:
        """Give the recordings' memory back; passes after this are recorded anew."""
        self._recordings.clear()
        self._met.clear()
        self._gradients = []
        self._forget()

    def _takes(self, shape: Shape, begins: bool) -> bool:
        """Return whether a pass of this shape is repeated from a recording, be it one that is yet to be made."""
        recorded = {known for known, _ in self._recordings}
        if shape in recorded:
            return True
        return self._met[shape] > 1 and len(recorded) < MOST_SHAPES and (begins or bool(self._gradients))

    def _gather(self, begins: bool) -> None:
        """Make the memory of the gradients hold what they are so far."""
        if begins:
            torch._foreach_zero_(self._gradients)
        pairs = zip(self._gradients, self._parameters, strict=True)
        elsewhere = [(memory, p.grad) for memory, p in pairs if p.grad is not None and p.grad is not memory]
        if elsewhere:  # a pass that was not repeated came before in this step
            torch._foreach_copy_([memory for memory, _ in elsewhere], [gradient for _, gradient in elsewhere])
        self._point()

    def _point(self) -> None:
        for parameter, memory in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = memory

    def _record(self, batch: Batch, owns: bool) -> _Recording:
        inputs = {name: tensor.new_empty(self._filled(name, tensor)) for name, tensor in batch.items()}
        self._fill(inputs, batch)
        self._model.fixed_shapes = True
        try:
            self._forget()
            self._recorder.warm_up(lambda: self._run(inputs))
            self._forget()
            if not owns:
                self._point()
            replay, loss = self._recorder.record(lambda: self._run(inputs))
        finally:
            self._model.fixed_shapes = False
        if owns:
            found = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if len(found) < len(self._parameters):
                raise RuntimeError(f"{len(self._parameters) - len(found)} trained tensors got no gradient")
            self._gradients = found
        self.counts["recorded"] += 1
        return _Recording(inputs, replay, loss)

    def _filled(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of a tensor of a batch, its rows filled up if they may be."""
        if name not in self._padding:
            return tuple(tensor.shape)
        rows, tokens = tensor.shape
        return rows, -(-tokens // LENGTH_STEP) * LENGTH_STEP

    def _fill(self, inputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Copy the batch into the memory of the inputs and fill up what is left of the rows."""
        for name, tensor in batch.items():
            memory = inputs[name]
            if memory.shape != tensor.shape:
                tokens = tensor.shape[1]
                memory[:, tokens:].fill_(self._padding[name])
                memory = memory[:, :tokens]
            memory.copy_(tensor, non_blocking=True)

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
