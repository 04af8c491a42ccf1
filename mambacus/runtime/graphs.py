"""CUDA graphs: what a GPU does is recorded once and then repeated by one call, with the addresses that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Recorder(Protocol):
    """Makes recordings."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once so that all kernels are there, without a trace in the random numbers."""

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Return what repeats ``run``, and the memory of its result."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: one runs at a time.

    A graph keeps what its ``run`` returned, as long as somebody holds that; all other memory is the next one's too.

    Args:
        device: where the graphs run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run on another stream, as recording will."""
        place = torch.cuda.get_rng_state(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.set_rng_state(place, self._device)

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record ``run``, which is not carried out."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph.replay, result
