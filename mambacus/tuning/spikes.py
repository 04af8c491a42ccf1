"""A loss that leaps and stays up: told from the noise of small batches by the losses before it.

A step is suspect if its loss exceeds the median of the last `WINDOW` unsuspected ones by more than `SPREADS` times
their median absolute deviation and by more than `LEAST` nats; `PATIENCE` suspect steps in a row are a spike. In the
runs whose curves are in ``benchmarks/`` no step goes a third of that way; of batches of one sample, whose losses have a
heavy tail, one step in 25 was suspect and never three in a row (250 steps of ``tiny``, ``lora`` and ``cs5242``).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mambacus.tuning import processes
from mambacus.tuning.audit import GradientAudit

WINDOW = 50  # losses that are remembered
ENOUGH = 10  # of them before any step is suspect
SPREADS = 10.0
LEAST = 1.0  # nats
PATIENCE = 8  # suspect steps in a row that stop a run


class LossWatch:
    """Judges the loss of each step by those before it.

    Args:
        losses: those that an interrupted run remembered.

    Attributes:
        usual: the last losses that were not suspect.
        suspect: the losses since the last one that was not.
    """

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.usual = deque(losses, maxlen=WINDOW)
        self.suspect: list[float] = []

    @property
    def median(self) -> float:
        """Return the median of the usual losses."""
        return statistics.median(self.usual)

    def see(self, loss: float) -> bool:
        """Take the loss of the next step; return whether it makes a spike."""
        if len(self.usual) >= ENOUGH and loss > self._bound():
            self.suspect.append(loss)
        else:
            self.usual.append(loss)
            self.suspect.clear()
        return len(self.suspect) >= PATIENCE

    def _bound(self) -> float:
        deviation = statistics.median(abs(loss - self.median) for loss in self.usual)
        return self.median + max(SPREADS * deviation, LEAST)


class GradientWatch:
    """Remembers on the device how large the gradient of each tensor usually is, to say whose share grew most."""

    def __init__(self) -> None:
        self._usual: Tensor | None = None
        self._first: Tensor | None = None

    def see(self, norms: Tensor, suspects: int) -> None:
        """Take the norms (n,) of this process's parts of the gradients of a step, and how many are suspect up to it."""
        if suspects == 1:
            self._first = norms.square()
        elif not suspects:
            self._usual = norms.square() if self._usual is None else self._usual.lerp(norms.square(), 0.1)

    def grown(self) -> int | None:
        """Return the number of the tensor whose gradient had grown most at the first suspect step; None if not known.

        Gradients are seen after they were clipped, so it is their shares that are compared.
        """
        if self._usual is None or self._first is None:
            return None
        squares = torch.stack((self._usual, self._first))
        if processes.is_sharded():
            torch.distributed.all_reduce(squares)
        usual, first = squares / squares.sum(1, keepdim=True)
        growth = (first / usual).nan_to_num(0.0)
        return int(growth.argmax())


class SpikeStop(TrainerCallback):
    """What the Trainer's loop does for the watch: it sees gradients, and writes no checkpoint of suspect weights.

    One that falls due while the loss is suspect is written once it is not, so the ones before it stay.

    Args:
        audit: has the norms of the gradients.
        losses: as `LossWatch` takes them.
    """

    def __init__(self, audit: GradientAudit, losses: Sequence[float]) -> None:
        self.losses = LossWatch(losses)
        self.gradients = GradientWatch()
        self._audit = audit
        self._due = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See the gradients, after the audit."""
        if self._audit.norms is not None:
            self.gradients.see(self._audit.norms, len(self.losses.suspect))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put off the checkpoint of a suspect step."""
        due = control.should_save or self._due
        self._due = due and bool(self.losses.suspect)
        control.should_save = due and not self._due

    def named(self) -> str | None:
        """Return the name of the tensor that `GradientWatch.grown` finds."""
        number = self.gradients.grown()
        return None if number is None else list(self._audit.parameters)[number]


def step_loss(parts: Tensor) -> float:
    """Return the loss of a step from what each process's micro-batches add up to, as the log has it."""
    if processes.world_size() == 1:
        return parts.item()
    total = parts.clone()
    torch.distributed.all_reduce(total)
    return total.item() / processes.world_size()
