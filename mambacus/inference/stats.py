"""What an engine counts."""

from __future__ import annotations

import dataclasses


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
