"""What an engine gives: completions, their scores, and the pieces they arrive in."""

from __future__ import annotations

import dataclasses
from typing import Any

from mambacus.models import MambaState


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """The model's own opinion of one token, before any bias, penalty or temperature.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the likeliest tokens at this place with their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        text: the completion, cut before a stop string and without the end-of-text token; empty without a tokenizer.
        token_ids: every generated token, also those of the stop string and the end-of-text token.
        finish_reason: ``stop`` (a stop string), ``eos`` (the end-of-text token), ``length`` (``max_new_tokens``) or
            ``cancelled``.
        logprobs: one score for each of ``token_ids``, if asked for.
        prompt_logprobs: one score for each token of the prompt, None for the first, if asked for.
        state: the state after the prompt and all of ``token_ids`` but the last, if asked for.
        prompt_state: the state after the prompt, if states were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenScore] | None = None
    prompt_logprobs: list[TokenScore | None] | None = None
    state: MambaState | None = dataclasses.field(default=None, compare=False, repr=False)
    prompt_state: MambaState | None = dataclasses.field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return text, tokens, the reason of the end and, if they were asked for, scores, as JSON values."""
        plain: dict[str, Any] = {
            "text": self.text, "token_ids": self.token_ids, "finish_reason": self.finish_reason,
        }  # fmt: skip
        if self.logprobs is not None:
            plain["logprobs"] = [dataclasses.asdict(score) for score in self.logprobs]
        return plain


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next part of one completion.

    Attributes:
        prompt: number of its prompt.
        sample: number of the completion among the prompt's ``n``.
        text: what is new of the text; all pieces of a completion, joined, are its text. Text that could yet become a
            stop string or a character of several tokens is held back until that is settled.
        token_ids: what is new of the tokens.
        logprobs: their scores, if asked for.
        completion: the whole completion, in its last piece.
        error: why there is no completion, in the last piece of a request that failed.
    """

    prompt: int
    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenScore] | None = None
    completion: Completion | None = None
    error: str | None = None
