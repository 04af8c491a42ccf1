"""Recordings without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FakeRecorder:
    """Repeats what was recorded by running it again in the memory it was recorded with, as a CUDA graph would.

    Attributes:
        replays: how often anything was repeated.
    """

    def __init__(self) -> None:
        self.replays = 0

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once."""
        run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return what repeats ``run``, and the memory of its result, in which there is nothing yet."""
        like = run()
        with torch.inference_mode(False):  # a graph writes into its memory in any mode
            memory = torch.full_like(like, torch.nan if like.is_floating_point() else -12345)

        def replay() -> None:
            self.replays += 1
            memory.copy_(run())

        return replay, memory
