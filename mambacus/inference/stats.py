"""What an engine counts."""

from __future__ import annotations

import dataclasses
import time

import torch


@dataclasses.dataclass
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        prompt_tokens: tokens read in prefill.
        generated_tokens: tokens chosen.
        prefill_seconds: time spent reading prompts.
        decode_seconds: time spent on everything after.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time spent in all."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, reading of the prompts included; 0 before the first."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class Clock:
    """Tells reading from decoding in the time of an engine's steps.

    On a GPU the host queues the first tokens while the prompts are still read. So where nothing else is decoded,
    reading takes from its first pass to the end of its last by the GPU's clock, and the rest of the time is decoding.

    Args:
        stats: counted in.
        device: of the engine.
    """

    def __init__(self, stats: EngineStats, device: torch.device) -> None:
        self._stats, self._device = stats, device
        self._began = 0.0  # of the step
        self._read = 0.0  # seconds of the step so far
        self._first: torch.cuda.Event | None = None  # before the first pass of what is being read
        self._last: torch.cuda.Event | None = None
        self._counted = 0.0  # seconds of it in steps before

    def begin(self, *, alone: bool) -> None:
        """Begin a step; ``alone``: no row is being decoded."""
        self._began = time.perf_counter()
        self._last = None
        if not alone or self._device.type != "cuda":
            self._first = None
        elif self._first is None:
            self._first, self._counted = self._mark(), 0.0

    def has_read(self, *, ready: bool, goes_on: bool) -> None:
        """Note that the step's pass, if there was one, is queued.

        ``ready``: it was the last one of some prompt; ``goes_on``: some prompt is read in part.
        """
        self._read = time.perf_counter() - self._began
        if self._first is not None and ready:
            self._last = self._mark()
        elif not goes_on:
            self._first = None

    def end(self) -> None:
        """Count the step."""
        if self._first is not None and self._last is not None:
            self._last.synchronize()
            self._read = max(0.0, 1e-3 * self._first.elapsed_time(self._last) - self._counted)
            self._first = None
        whole = time.perf_counter() - self._began
        read = min(self._read, whole)
        self._counted += read
        self._stats.prefill_seconds += read
        self._stats.decode_seconds += whole - read

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
