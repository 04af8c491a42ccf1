"""Batched generation from a Mamba model: read each prompt once, fork its state, decode rows until each is done."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.inference.sampling import SamplingParams, choose_tokens, generator_for
from mambacus.models import MambaLM, MambaState
from mambacus.runtime.errors import UserError

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        text: the completion, cut before a stop string and without the end-of-text token; empty without a tokenizer.
        token_ids: every generated token, also those of the stop string and the end-of-text token.
        finish_reason: ``stop`` (a stop string), ``eos`` (the end-of-text token) or ``length`` (``max_new_tokens``).
    """

    text: str
    token_ids: list[int]
    finish_reason: str


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


@dataclasses.dataclass
class _Row:
    """One completion in the making."""

    prompt: int  # number of its prompt
    random: random.Random
    token_ids: list[int] = dataclasses.field(default_factory=list)
    done: Completion | None = None


class Engine:
    """Generates completions.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one.
        tokenizer: a transformers tokenizer; None if all prompts are token ids and no stop strings are used.
        batch_size: most rows decoded at once.
        prefill_tokens: most tokens read in one forward pass; longer prompts are read in chunks.

    Attributes:
        stats: `EngineStats`, counted over all calls.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, batch_size: int = 16, prefill_tokens: int = 4096
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if not isinstance(base, MambaLM):
            raise TypeError(f"Engine: expected a MambaLM, got a {type(base).__name__}")
        for name, value in (("batch_size", batch_size), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise UserError(f"{name}: expected >= 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.stats = EngineStats()
        self._base = base
        self._eos = _eos_ids(base, tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        state: MambaState | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Complete each prompt ``params.n`` times.

        Args:
            prompts: texts, tokenized without added special tokens, or lists of token ids. An empty prompt starts a new
                document; after a ``state`` it is refused, since a state holds no logits.
            params: how to choose tokens; greedy by default.
            state: every prompt goes on from it: one row for all, or one row for each.
            progress: called with the number of prompts just finished.

        Returns:
            For each prompt, in order, its completions. They do not depend on the other prompts or on ``batch_size``,
            but for rounding in the matrix products.

        Raises:
            UserError: a text without a tokenizer, an empty prompt after a state, a state of another model.
        """
        params = params or SamplingParams()
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got one string")
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        ids = [self.encode(prompt, continues=state is not None) for prompt in prompts]
        state = self._place(state, len(ids)) if state is not None else None
        finished: list[list[Completion]] = [[] for _ in ids]
        with torch.no_grad(), self._evaluating():
            for group in _groups(ids, max(1, self.batch_size // params.n)):
                logits, after = self._prefill([ids[i] for i in group], _rows_of(state, group))
                rows = [_Row(i, generator_for(params.seed, ids[i], j)) for i in group for j in range(params.n)]
                seen = self._seen([ids[i] for i in group], params)
                for start in range(0, len(rows), self.batch_size):
                    part = range(start, min(start + self.batch_size, len(rows)))
                    sources = torch.tensor([k // params.n for k in part], device=logits.device)
                    fork = after if len(part) == len(rows) and params.n == 1 else after.select(sources)
                    marks = None if seen is None else seen[sources]
                    self._decode([rows[k] for k in part], logits[sources], fork, marks, params)
                for row in rows:
                    assert row.done is not None
                    finished[row.prompt].append(row.done)
                if progress is not None:
                    progress(len(group))
        return finished

    def prefill(self, prompt: Prompt, state: MambaState | None = None) -> MambaState:
        """Return the state after ``prompt``, read from the start of a document or after ``state`` (one row).

        A completion of ``prompt + rest`` equals one of ``rest`` from this state if the tokens are the same: where a
        text is cut can change how it is tokenized.
        """
        ids = self.encode(prompt, continues=state is not None)
        with torch.no_grad(), self._evaluating():
            return self._prefill([ids], self._place(state, 1) if state is not None else None)[1]

    def encode(self, prompt: Prompt, *, continues: bool = False) -> list[int]:
        """Return the token ids of a prompt; an empty one that does not continue a state starts a document."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("a text prompt needs a tokenizer; this model has none")
            ids = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        else:
            ids = [int(token) for token in prompt]
        if ids:
            wrong = next((token for token in ids if not 0 <= token < self._base.config.padded_vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"token id {wrong}: the model's vocabulary has {self._base.config.padded_vocab_size} tokens; "
                    "is the tokenizer another model's?"
                )
            return ids
        if continues:
            raise UserError("an empty prompt cannot follow a state: give at least one token to read")
        start = getattr(self.tokenizer, "bos_token_id", None)
        start = start if start is not None else self._base.config.bos_token_id
        if start is None:
            raise UserError("an empty prompt needs a model with a token that starts a document (bos_token_id)")
        return [start]

    def _place(self, state: MambaState, prompts: int) -> MambaState:
        misfit = state.fits(self._base.config)
        if misfit is None and state.batch not in (1, prompts):
            misfit = f"expected 1 row or {prompts}, one for each prompt, got {state.batch}"
        if misfit:
            raise UserError(f"the state does not fit the model: {misfit}")
        return state.to(self._base.device, self._base.dtype)

    def _prefill(self, prompts: Sequence[Sequence[int]], state: MambaState | None) -> tuple[Tensor, MambaState]:
        """Read prompts, longest first; return the logits after each (rows, vocabulary) and the state.

        The batch is read in chunks of columns. A prompt that ends is padded on the right to its chunk's end and then
        leaves the batch; as the prompts get shorter, those are always the last rows.
        """
        began = time.perf_counter()
        lengths = [len(prompt) for prompt in prompts]
        width = max(1, self.prefill_tokens // len(prompts))
        logits, states = [], []
        for start in range(0, lengths[0], width):
            active = sum(length > start for length in lengths)
            parts = [list(prompt[start : start + width]) for prompt in prompts[:active]]
            out = self.model(**self._pad(parts), state=state)
            staying = sum(length > start + width for length in lengths)
            logits.append(out.logits[staying:, 0])
            ended = range(staying, active)
            states.append(out.state if not staying else out.state.select(ended))
            state = out.state.select(range(staying)) if staying else None
        self.stats.prompt_tokens += sum(lengths)
        result = torch.cat(logits[::-1]), states[0] if len(states) == 1 else MambaState.cat(states[::-1])
        self._synchronize()
        self.stats.prefill_seconds += time.perf_counter() - began
        return result

    def _pad(self, parts: Sequence[list[int]]) -> dict[str, Tensor | None]:
        """Return the inputs for rows of tokens padded on the right, and the position of each row's last token."""
        device, width = self._base.device, max(map(len, parts))
        ragged = min(map(len, parts)) < width
        return {
            "input_ids": torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device),
            "seq_idx": torch.tensor(
                [[0] * len(part) + [-1] * (width - len(part)) for part in parts], dtype=torch.int32, device=device
            )
            if ragged
            else None,
            "logits_at": torch.tensor([[len(part) - 1] for part in parts], device=device),
        }

    def _decode(
        self, rows: list[_Row], logits: Tensor, state: MambaState, seen: Tensor | None, params: SamplingParams
    ) -> None:
        """Choose tokens until every row is done; rows that are done leave the batch."""
        began = time.perf_counter()
        while True:
            draws = [row.random.random() for row in rows] if params.temperature else []
            tokens = choose_tokens(logits, params, draws, seen)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.token_ids.append(token)
                row.done = self._finish(row.token_ids, params)
            self.stats.generated_tokens += len(rows)
            alive = [k for k, row in enumerate(rows) if row.done is None]
            if not alive:
                break
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            if len(alive) < len(rows):
                index = torch.tensor(alive, device=tokens.device)
                rows, tokens, state = [rows[k] for k in alive], tokens[index], state.select(index)
                seen = None if seen is None else seen[index]
            out = self.model(input_ids=tokens[:, None], state=state, reuse_state=True)
            logits, state = out.logits[:, 0], out.state
        self.stats.decode_seconds += time.perf_counter() - began

    def _finish(self, token_ids: list[int], params: SamplingParams) -> Completion | None:
        """Return the completion if its last token ends it."""
        if token_ids[-1] in self._eos and not params.ignore_eos:
            return Completion(self._text(token_ids[:-1]), token_ids, "eos")
        if params.stop:
            # A stop string of b bytes ends within the last token, so it begins within the last b; a few more make
            # up for tokenizers that treat the first token of a text differently.
            window = max(len(stop.encode()) for stop in params.stop) + 4
            tail = self._text(token_ids[-window:])
            if any(stop in tail for stop in params.stop):
                text = self._text(token_ids)
                cuts = [text.find(stop) for stop in params.stop if stop in text]
                if cuts:
                    return Completion(text[: min(cuts)], token_ids, "stop")
        if len(token_ids) == params.max_new_tokens:
            return Completion(self._text(token_ids), token_ids, "length")
        return None

    def _text(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _seen(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Tensor | None:
        """Return which tokens each prompt holds, bool (prompts, vocabulary), if ``repetition_penalty`` asks for it."""
        if params.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(len(prompts), self._base.config.padded_vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        return seen.to(self._base.device)

    def _synchronize(self) -> None:
        """Wait for the device, so that times are those of the work; choosing a token waits anyway."""
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch dropout off for a while."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def _eos_ids(model: MambaLM, tokenizer: Any) -> set[int]:
    """Return the ids that end a text: the tokenizer's, else the model's."""
    eos = getattr(tokenizer, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {eos}


def _groups(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield numbers of prompts in groups of ``size``, longest prompt first, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _rows_of(state: MambaState | None, prompts: Sequence[int]) -> MambaState | None:
    """Return the rows of ``state`` for these prompts: a single row is every prompt's."""
    if state is None:
        return None
    return state.fork(len(prompts)) if state.batch == 1 else state.select(prompts)
