"""Generation from a Mamba model: prompts in, completions out, as a whole or piece by piece."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mambacus.inference.completion import Completion, Piece
from mambacus.inference.decoder import Decoder
from mambacus.inference.prefix_cache import PrefixCache
from mambacus.inference.prompt_passes import PromptPasses
from mambacus.inference.reading import Request, read_alone
from mambacus.inference.sampling import SamplingParams
from mambacus.inference.scheduler import Scheduler
from mambacus.inference.stats import EngineStats
from mambacus.inference.text import stop_tokens
from mambacus.models import MambaLM, MambaState
from mambacus.models.primed import PrimedModel
from mambacus.runtime.errors import UserError

Prompt = str | Sequence[int]


class Engine:
    """Generates completions.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one.
        tokenizer: a transformers tokenizer; None if all prompts are token ids and no stop strings are used.
        batch_size: most rows decoded at once.
        prefill_tokens: most tokens read in one forward pass; longer prompts are read in chunks, so that the memory for
            reading does not grow with the prompt.
        prefix_cache_bytes: remember so many bytes of states, so that prompts which begin as earlier ones did are read
            from there; 0 remembers nothing.
        graphs: on a GPU, record decoding steps and passes over prompts as CUDA graphs where the model allows it.

    Attributes:
        stats: `EngineStats`, counted over all calls.
        prefix_cache: the states that are remembered, or None.
        on_read: called with the number of prompt tokens that each pass has read, for progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        batch_size: int = 16,
        prefill_tokens: int = 4096,
        prefix_cache_bytes: int = 0,
        graphs: bool = True,
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
        self.prefix_cache = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self.on_read: Callable[[int], None] | None = None
        self._base = base
        self._eos = _eos_ids(base, tokenizer)
        self._graphs = graphs
        self._decoder: Decoder | None = None  # kept between calls with its memory and graphs
        self._passes: PromptPasses | None = None  # as well

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        state: MambaState | None = None,
        *,
        progress: Callable[[int], object] | None = None,
        keep_state: bool = False,
        state_ids: Collection[int] = (),
    ) -> list[list[Completion]]:
        """Complete each prompt ``params.n`` times.

        Args:
            prompts: texts, tokenized without added special tokens, or token ids (an ``array('q')`` of a very long
                prompt is not copied). An empty prompt starts a new
                document; after a ``state`` it is refused, since a state holds no logits.
            params: how to choose tokens, for all prompts or for each; greedy by default.
            state: every prompt goes on from it: one row for all, or one row for each.
            progress: called with the number of prompts just finished.
            keep_state: completions carry their state.
            state_ids: the tokens behind ``state``, where they are known: a repetition penalty applies to them too.

        Returns:
            For each prompt, in order, its completions. They do not depend on the other prompts or on ``batch_size``,
            but for rounding in the matrix products.

        Raises:
            UserError: a text without a tokenizer, an empty prompt after a state, a state of another model.
        """
        requests = self.requests(prompts, params, state, keep_state=keep_state, state_ids=state_ids)
        finished: list[list[Completion | None]] = [[None] * request.params.n for request in requests]
        left = [request.params.n for request in requests]
        for piece in self.run(sorted(requests, key=lambda request: -len(request.ids))):  # little is padded then
            if piece.error is not None:
                raise UserError(piece.error)
            finished[piece.prompt][piece.sample] = piece.completion
            left[piece.prompt] -= 1
            if progress is not None and not left[piece.prompt]:
                progress(1)
        return [[completion for completion in row if completion is not None] for row in finished]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        state: MambaState | None = None,
        *,
        keep_state: bool = False,
    ) -> Iterator[Piece]:
        """Yield the pieces of all completions as they come; the arguments are those of `generate`.

        Closing the iterator gives up what is not finished.

        Raises:
            UserError: as `generate`.
        """
        return self.run(self.requests(prompts, params, state, keep_state=keep_state, stream=True))

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        state: MambaState | None = None,
        *,
        stream: bool = False,
        keep_state: bool = False,
        state_ids: Collection[int] = (),
    ) -> list[Request]:
        """Return what `run` and `Scheduler.submit` take, checked, one for each prompt.

        The arguments are those of `generate`; with ``stream`` a piece is made for every token.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got one string")
        ids = [self._ids(prompt, continues=state is not None) for prompt in prompts]
        every = _for_each(params or SamplingParams(), len(ids))
        for one in every:
            self._check(one)
        state = self._fit(state, len(ids)) if state is not None else None
        rows = [None if state is None else state.narrow(i if state.batch > 1 else 0, 1) for i in range(len(ids))]
        behind = frozenset(state_ids)
        return [
            Request(ids[i], every[i], i, rows[i], behind, stream=stream, keep_state=keep_state)
            for i in range(len(ids))
        ]  # fmt: skip

    def scheduler(self) -> Scheduler:
        """Return what runs requests step by step, as a server needs it; it has rows of its own."""
        decoder, passes = self._decoder, self._passes or self._new_passes()
        decoder = decoder or Decoder(self.model, self._base, self.batch_size, graphs=self._graphs)
        self._decoder = self._passes = None
        decoder.begin()
        scheduler = Scheduler(
            self.model, self._base, decoder, passes, self.tokenizer, self._eos, self.prefill_tokens, self.prefix_cache,
            self.stats,
        )  # fmt: skip
        scheduler.on_read = self.on_read
        return scheduler

    def prefill(self, prompt: Prompt, state: MambaState | None = None) -> MambaState:
        """Return the state after ``prompt``, read from the start of a document or after ``state`` (one row).

        A completion of ``prompt + rest`` equals one of ``rest`` from this state if the tokens are the same: where a
        text is cut can change how it is tokenized.
        """
        ids = self.encode(prompt, continues=state is not None)
        state = self._fit(state, 1) if state is not None else None
        self._passes = self._passes or self._new_passes()
        with torch.no_grad(), self._evaluating():
            for count, after in read_alone(self._passes, ids, state, self.prefill_tokens):
                state = after
                self.stats.prompt_tokens += count
                if self.on_read is not None:
                    self.on_read(count)
        assert state is not None
        return state

    def encode(self, prompt: Prompt, *, continues: bool = False) -> list[int]:
        """Return the token ids of a prompt; an empty one that does not continue a state starts a document.

        Raises:
            UserError: not text, no tokenizer, a token that the model does not know, or nothing to read after a state.
        """
        return self._ids(prompt, continues=continues).tolist()

    def _ids(self, prompt: Prompt, *, continues: bool) -> array[int]:
        """Return what `encode` does, eight bytes a token; an ``array('q')`` as it is."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("a text prompt needs a tokenizer; this model has none")
            if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError("the prompt holds half of a surrogate pair, which is no character")
            ids = array("q", self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        else:
            ids = self._tokens(prompt)
        if ids:
            self._check_ids(ids)
            return ids
        if continues or isinstance(self.model, PrimedModel):
            raise UserError("an empty prompt cannot follow a state: give at least one token to read")
        start = getattr(self.tokenizer, "bos_token_id", None)
        start = start if start is not None else self._base.config.bos_token_id
        if start is None:
            raise UserError("an empty prompt needs a model with a token that starts a document (bos_token_id)")
        return array("q", [start])

    def _tokens(self, prompt: Iterable[int]) -> array[int]:
        if isinstance(prompt, array) and prompt.typecode == "q":
            return prompt
        numbers = prompt if isinstance(prompt, (list, tuple)) else list(prompt)
        try:
            return array("q", numbers)
        except (TypeError, OverflowError):  # whole numbers of other types, or too large
            whole = [self._whole(number) for number in numbers]
        wrong = next((number for number in whole if abs(number) >= 2**63), None)
        if wrong is not None:
            raise self._unknown(wrong)
        return array("q", whole)

    def _whole(self, number: Any) -> int:
        try:
            return int(number)
        except (ValueError, OverflowError):  # NaN, infinity, a tensor of several numbers, a word
            raise UserError(f"expected token ids, got {number!r}") from None

    def _check_ids(self, ids: array[int]) -> None:
        size = self._base.config.padded_vocab_size
        least, most = (int(end) for end in torch.frombuffer(ids, dtype=torch.int64).aminmax())
        if least < 0 or most >= size:
            raise self._unknown(least if least < 0 else most)

    def _unknown(self, token: int) -> UserError:
        size = self._base.config.padded_vocab_size
        return UserError(
            f"token id {token}: the model's vocabulary has {size} tokens; is the tokenizer another model's?"
        )

    def check(self, prompt: Prompt, params: SamplingParams, *, continues: bool = False) -> None:
        """Find fault with a prompt now and not when it is asked.

        Raises:
            UserError: as `generate`.
        """
        self._ids(prompt, continues=continues)
        self._check(params)

    def _check(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        stop_tokens(self.tokenizer, params.stop)
        size = self._base.config.padded_vocab_size
        wrong = next((token for token in params.logit_bias if not 0 <= token < size), None)
        if wrong is not None:
            raise UserError(f"logit_bias: token id {wrong}: the model's vocabulary has {size} tokens")

    def _fit(self, state: MambaState, prompts: int) -> MambaState:
        misfit = state.fits(self._base.config)
        if misfit is None and state.batch not in (1, prompts):
            misfit = f"expected 1 row or {prompts}, one for each prompt, got {state.batch}"
        if misfit:
            raise UserError(f"the state does not fit the model: {misfit}")
        return state.to(self._base.device, self._base.dtype)

    def run(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Yield the pieces of what `requests` returned, as they come.

        One whose ``cancelled`` is set is given up; all are if the caller stops listening. A request that fails has an
        ``error`` in its last piece, and the others go on.
        """
        scheduler = self.scheduler()
        try:
            for request in requests:
                scheduler.submit(request)
            while scheduler.active or scheduler.waiting:
                with self._evaluating():
                    pieces = scheduler.step()
                yield from pieces
        finally:
            self._decoder, self._passes = scheduler.decoder, scheduler.passes

    def _new_passes(self) -> PromptPasses:
        return PromptPasses(self.model, self._base, graphs=self._graphs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch dropout off for a while."""
        if not self.model.training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def _for_each(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """Return one set of parameters for each prompt."""
    if isinstance(params, SamplingParams):
        return list(itertools.repeat(params, prompts))
    if len(params) != prompts:
        raise UserError(f"params: expected one or {prompts}, one for each prompt, got {len(params)}")
    return list(params)


def _eos_ids(model: MambaLM, tokenizer: Any) -> set[int]:
    """Return the ids that end a text: the tokenizer's, else the model's."""
    eos = getattr(tokenizer, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {eos}
