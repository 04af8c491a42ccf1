"""Several processes on one evaluation: ``accelerate launch -m mambacus evaluate`` gives each its share of documents.

lm_eval deals the documents out (process r of n takes documents r, r + n, ...) and gathers the scores; this module makes
the processes known to it and puts the scores back in the order of the documents.
"""

from __future__ import annotations

import datetime
import itertools
import os
from typing import Any

import torch

from mambacus.runtime.errors import UserError


def launched() -> int:
    """Return how many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """The processes of one launch, as lm_eval's models speak to them.

    Args:
        device: what the user asked for; every process takes a GPU of its own where that is CUDA.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: this process's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = 0, launched(), device
        self.accelerator: Any = None
        if self.count == 1:
            return
        if device.type == "cuda" and device.index is not None:
            raise UserError(f"--device {device}: {self.count} processes were launched; expected cuda, auto or cpu")
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        patient = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))  # one share may take hours longer
        self.accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patient])
        self.rank, self.device = self.accelerator.process_index, self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def attach(self, model: Any) -> Any:
        """Make the processes known to an lm_eval model, and return it."""
        if self.count > 1:
            model._rank, model._world_size, model.accelerator = self.rank, self.count, self.accelerator
            model.all_gather, model.barrier = self.accelerator.gather, self.accelerator.wait_for_everyone
            model.gather_object = self.gather
        return model

    def gather(self, value: Any, dst: int = 0) -> list[Any] | None:
        """Return the values of all processes on process ``dst``, None on the others.

        Values by task and metric, as lm_eval gathers them, come back in the order of the documents, all under the first
        process: resampled standard errors depend on the order.
        """
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.rank == dst else None
        torch.distributed.gather_object(value, values, dst=dst)
        if values is None or not all(isinstance(part, dict) and _by_metric(part) for part in values):
            return values
        first, *others = values
        merged = {
            task: {metric: _dealt_back([part[task][metric] for part in values]) for metric in metrics}
            for task, metrics in first.items()
        }
        empty: dict[str, dict[Any, list[Any]]] = {
            task: {metric: [] for metric in metrics} for task, metrics in first.items()
        }
        return [merged, *([empty] * len(others))]


def _by_metric(part: dict[str, Any]) -> bool:
    return bool(part) and all(
        isinstance(metrics, dict) and all(isinstance(values, list) for values in metrics.values())
        for metrics in part.values()
    )


def _dealt_back(shares: list[list[Any]]) -> list[Any]:
    """Return the values in the order in which they were dealt to the shares, one by one."""
    nothing = object()
    rounds = itertools.zip_longest(*shares, fillvalue=nothing)
    return [value for dealt in rounds for value in dealt if value is not nothing]


def summed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of counts from those of all processes: numbers are added, the rest is the first's."""
    total = dict(records[0])
    for record in records[1:]:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total[key] += value
    return total
