"""What a fine-tuning run shows while it runs: one line on a terminal, and a history for TensorBoard."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from mambacus.tuning import processes
from mambacus.tuning.packing import PlannedBatches


def tensorboard(folder: Path) -> TrainerCallback:
    """Return what writes the history for TensorBoard into ``folder / "tensorboard"``."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))


class Progress(TrainerCallback):
    """One line on a terminal: steps, loss, real tokens per second; nothing where the output is a file.

    Args:
        data: the run's micro-batches, for their tokens.
    """

    def __init__(self, data: PlannedBatches) -> None:
        self._tokens_per_step = data.plan.tokens / data.plan.steps
        self._bar: tqdm[Any] | None = None
        self._loss = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the line."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="finetune", unit="step", dynamic_ncols=True,
            disable=not sys.stderr.isatty() or not processes.is_main(),
        )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance by one step; make the last step appear in the history."""
        if self._bar is not None:
            rate = (self._bar.format_dict["rate"] or 0.0) * self._tokens_per_step
            self._bar.set_postfix_str(f"loss {self._loss:.3f}, {rate:,.0f} tok/s", refresh=False)
            self._bar.update()
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the loss."""
        self._loss = kwargs.get("logs", {}).get("loss", self._loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the line."""
        if self._bar is not None:
            self._bar.close()
