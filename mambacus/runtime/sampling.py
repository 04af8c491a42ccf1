"""The flags that say how completions are made, shared by the verbs that generate; nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mambacus.runtime.config import Whole, opt
from mambacus.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How to choose tokens and when to stop."""

    max_new_tokens: int = opt(64, help="length limit of a completion in tokens", least=1)
    temperature: float = opt(0.0, help="0 takes the likeliest token", least=0)
    top_k: int = opt(0, help="draw from the k likeliest tokens, 0 for all", least=0)
    top_p: float = opt(1.0, help="draw from the likeliest tokens that sum to this probability", above=0, most=1)
    min_p: float = opt(0.0, help="draw from tokens at least this fraction as likely as the likeliest", least=0, most=1)
    repetition_penalty: float = opt(1.0, help="divide the logits of seen tokens by this", least=1e-6, most=1e6)
    logit_bias: tuple[str, ...] = opt((), help="add to logits, by token id: 198=-100,50256=5")
    stop: tuple[Whole, ...] = opt(
        (), help=r"string that ends a completion, once for each; commas are part of it, \n and \t are understood",
        metavar="TEXT",
    )  # fmt: skip
    seed: int = opt(0, help="seed of the draws")

    def options(self) -> dict[str, Any]:
        """Return the arguments for `mambacus.inference.SamplingParams`.

        Raises:
            UserError: a bias that is not ``ID=NUMBER``.
        """
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _biases(self.logit_bias),
            "stop": tuple(text.replace(r"\n", "\n").replace(r"\t", "\t") for text in self.stop),
            "seed": self.seed,
        }


def _biases(given: Sequence[str]) -> dict[int, float]:
    biases = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise UserError(f"--logit-bias: expected ID=NUMBER, got {text!r}") from None
    return biases
