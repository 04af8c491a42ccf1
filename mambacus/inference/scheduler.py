"""Continuous batching: rows that are done leave, prompts that wait take their place, long prompts do not stop the rest.

One `step` reads at most one chunk of the waiting prompts and chooses the next token of every row. On a GPU it queues
the next few tokens of every row and looks at those queued by the step before, so that the GPU does not wait for the
host: a row that ended meanwhile computes a few tokens that nobody reads.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambacus.inference.completion import Completion, Piece, TokenScore
from mambacus.inference.decoder import Decoder
from mambacus.inference.prefix_cache import PrefixCache
from mambacus.inference.prompt_passes import PromptPasses
from mambacus.inference.reading import Reader, Ready, Request, score_tokens
from mambacus.inference.sampling import SamplingParams, choose_tokens, send
from mambacus.inference.stats import Clock, EngineStats
from mambacus.inference.text import TextStream, decode, stop_tokens
from mambacus.models import MambaLM, MambaState

GPU_BLOCK = 8  # tokens chosen on a GPU between two looks at them
NAN = "the model's logits are NaN: its state holds NaN or infinity, or its dtype is too narrow"


@dataclasses.dataclass(eq=False)
class _Row:
    """One completion in the making."""

    request: Request
    sample: int
    random: random.Random | None  # None where nothing is drawn
    text: TextStream | None
    prompt_scores: list[TokenScore | None] | None
    seen: Tensor | None  # bool (vocabulary,): tokens that a repetition penalty applies to
    stop_tokens: frozenset[int]
    prompt_state: MambaState | None
    chosen: int = 0  # tokens chosen so far, of which the last ones may not have been looked at
    end_state: MambaState | None = None  # after all tokens but the last, of a row that is as long as it may get
    token_ids: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    told: int = 0  # tokens that pieces told of
    completion: Completion | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        """Nothing more will be said of it."""
        return self.completion is not None or self.error is not None

    @property
    def full(self) -> bool:
        """As many tokens as it may have were chosen."""
        return self.chosen >= self.request.params.max_new_tokens


class _Block(NamedTuple):
    """Tokens on their way to the host: int64 (tokens, rows), when they are there, and the rows they are of."""

    tokens: Tensor
    arrived: torch.cuda.Event | None
    rows: list[_Row]

    @staticmethod
    def of(tokens: Tensor, rows: Sequence[_Row]) -> _Block:
        """Send them, without waiting."""
        if not tokens.is_cuda:
            return _Block(tokens, None, list(rows))
        here = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        here.copy_(tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(tokens.device))
        return _Block(here, arrived, list(rows))

    def wait(self) -> list[list[int]]:
        """Return the tokens when they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[list[int]] = self.tokens.tolist()
        return numbers


class _Group(NamedTuple):
    """Rows whose tokens are chosen together.

    Attributes:
        params: how.
        slots: int64 (their number,); None for all rows.
        seen: bool (rows, vocabulary), of which each row's `_Row.seen` is a part; None without a repetition penalty.
    """

    params: SamplingParams
    slots: Tensor | None
    seen: Tensor | None


class Scheduler:
    """Completes requests, many at a time.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one.
        base: the `MambaLM` in it.
        decoder: holds the rows; no other scheduler may use it meanwhile.
        passes: does the forward passes over prompts; no other scheduler may use it meanwhile.
        tokenizer: a transformers tokenizer or None.
        eos: tokens that end a text.
        prefill_tokens: most tokens read between two decoding steps.
        cache: states of texts that were read before, or None.
        stats: counted in.

    Attributes:
        decoder: as given.
        passes: as given.
        on_read: called with the number of prompt tokens that each pass has read.
    """

    def __init__(
        self,
        model: nn.Module,
        base: MambaLM,
        decoder: Decoder,
        passes: PromptPasses,
        tokenizer: object,
        eos: set[int],
        prefill_tokens: int,
        cache: PrefixCache | None,
        stats: EngineStats,
    ) -> None:
        self._model, self._base, self.decoder, self.passes, self._tokenizer = model, base, decoder, passes, tokenizer
        self._eos, self._cache, self._stats = eos, cache, stats
        self._clock = Clock(stats, base.device)
        self._incoming: deque[Request] = deque()
        self._reader = Reader(model, base, passes, prefill_tokens, cache, self._count_read)
        self._rows: list[_Row] = []
        self._logits: Tensor | None = None  # float32 (rows, vocabulary), after each row's last token
        self._queued: _Block | None = None  # not looked at yet
        self.on_read: Callable[[int], None] | None = None

    @property
    def active(self) -> int:
        """Completions that have begun and not ended."""
        return sum(not row.done for row in self._begun())

    @property
    def waiting(self) -> int:
        """Requests of which no row is being decoded yet."""
        return len(self._incoming) + len(self._reader) + len(self._reader.ready)

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue; any thread may."""
        self._incoming.append(request)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Go on by one step; return what is new. Nothing is left to do when nothing is active or waiting."""
        pieces = self._drop_cancelled()
        while self._incoming:
            self._reader.add(self._incoming.popleft())
        self._clock.begin(alone=not self._rows)
        self._read()
        self._place()
        self._clock.has_read(ready=bool(self._rows), goes_on=self._reader.goes_on)
        if self._rows or self._queued is not None:
            pieces += self._advance()
        self._clock.end()
        return pieces

    def _begun(self) -> list[_Row]:
        """Return the rows in the decoder, and those that left it before all of their tokens were looked at."""
        if self._queued is None:
            return self._rows
        here = set(self._rows)
        return self._rows + [row for row in self._queued.rows if row not in here]

    def _count_read(self, tokens: int) -> None:
        self._stats.prompt_tokens += tokens
        if self.on_read is not None:
            self.on_read(tokens)

    def _read(self) -> None:
        """Read one chunk.

        New prompts are taken when an eighth of the rows is free, so that they are read together and not one by one.
        """
        free = self.decoder.capacity - len(self._rows)
        ready = sum(item.request.params.n - item.begun for item in self._reader.ready)
        most = free - ready if free >= min(len(self._reader), max(1, self.decoder.capacity // 8)) else 0
        self._reader.read(most)

    def _place(self) -> None:
        """Let completions begin in the free rows: all samples of a prompt are forks of one state."""
        new = []
        while self._reader.ready and len(self._rows) < self.decoder.capacity:
            item = self._reader.ready[0]
            count = min(self.decoder.capacity - len(self._rows), item.request.params.n - item.begun)
            self.decoder.put(item.state, len(self._rows), count)
            new.append(item.logits.expand(count, -1))
            for sample in range(item.begun, item.begun + count):
                self._rows.append(self._row(item, sample))
            item.begun += count
            if item.begun == item.request.params.n:
                self._reader.ready.popleft()
        if new:
            self._logits = torch.cat(new if self._logits is None else [self._logits, *new])

    def _row(self, item: Ready, sample: int) -> _Row:
        request, params = item.request, item.request.params
        text = None
        if self._tokenizer is not None and (request.stream or params.stop):
            text = TextStream(self._tokenizer, params.stop)
        seen = None
        if params.repetition_penalty != 1.0:
            seen = torch.zeros(self._base.config.padded_vocab_size, dtype=torch.bool)
            seen[torch.tensor([*request.state_ids, *request.ids])] = True
            seen = seen.to(self._base.device)
        state = item.state.select([0]) if request.keep_state else None
        ends = stop_tokens(self._tokenizer, params.stop)
        return _Row(request, sample, request.generator(sample), text, item.scores, seen, ends, state)

    def _advance(self) -> list[Piece]:
        """Choose the next tokens of every row, and look at them: at once, or at those of the step before."""
        if not self._runs_ahead():
            pieces = self._look(self._queued)
            self._queued = None
            return pieces + self._choose_one() if self._rows else pieces
        queued, self._queued = self._queued, None
        if self._rows:
            self._queued = self._choose_block()
        return self._look(queued)

    def _runs_ahead(self) -> bool:
        """Tell whether tokens are chosen before the last ones were looked at: not if a row wants states or scores."""
        return self._base.device.type == "cuda" and not any(map(_wants_every_step, self._rows))

    def _choose_one(self) -> list[Piece]:
        """Choose the next token of every row, look at it, and compute the logits of the rows that go on."""
        rows, logits = list(self._rows), self._logits
        assert logits is not None
        draws = self._draw(1)
        tokens = self._choose(logits, _groups(rows, logits.device), None if draws is None else draws[0])
        scores = self._score(logits, tokens)
        for slot, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.chosen += 1
            self._take(row, token, scores.get(slot))
            if row.completion is not None and self._wants_state(row):
                row.end_state = self.decoder.state(slot)
            self._keep(row)
        pieces = [piece for piece in map(_tell, rows) if piece is not None]
        self._go_on(tokens, self._leave(lambda row: row.done))
        return pieces

    def _choose_block(self) -> _Block:
        """Choose the next few tokens of every row, and compute the logits of the rows that may go on."""
        rows, logits = list(self._rows), self._logits
        assert logits is not None
        groups = _groups(rows, logits.device)
        count = min(GPU_BLOCK, max(row.request.params.max_new_tokens - row.chosen for row in rows))
        draws = self._draw(count)
        tokens = self._choose(logits, groups, None if draws is None else draws[0])
        if self._may_follow(groups, count):
            rest = None if draws is None else draws[1:]
            following = self.decoder.follow(tokens.clamp(min=0), count - 1, groups[0].params, rest)
            block = torch.cat([tokens[None], following])
            for slot, row in enumerate(rows):
                self._count_chosen(slot, row, min(count, row.request.params.max_new_tokens - row.chosen))
        else:
            steps = [tokens]
            self._count_one(rows)
            for number in range(1, count):
                logits = self.decoder.step(steps[-1].clamp(min=0), unchanged=number > 1)
                steps.append(self._choose(logits, groups, None if draws is None else draws[number]))
                self._count_one(rows)
            block = torch.stack(steps)
        sent = _Block.of(block, rows)
        self._go_on(block[-1].clamp(min=0), self._leave(lambda row: row.full), unchanged=count > 1)
        return sent

    def _may_follow(self, groups: list[_Group], count: int) -> bool:
        """Tell whether `Decoder.follow` does: one rule for all rows, no state wanted on the way."""
        return (
            count > 1
            and len(groups) == 1
            and groups[0].seen is None
            and not any(
                self._wants_state(row) and row.request.params.max_new_tokens - row.chosen < count for row in self._rows
            )
        )

    def _count_chosen(self, slot: int, row: _Row, tokens: int) -> None:
        """Note that so many tokens of a row were chosen, all but the last of them read."""
        row.chosen += tokens
        if row.full and self._wants_state(row):
            row.end_state = self.decoder.state(slot)

    def _count_one(self, rows: Sequence[_Row]) -> None:
        for slot, row in enumerate(rows):
            if not row.full:
                self._count_chosen(slot, row, 1)

    def _draw(self, count: int) -> Tensor | None:
        """Return random numbers, float64 (``count``, rows), 0 for greedy rows; None if all rows are."""
        if all(row.random is None for row in self._rows):
            return None
        numbers = [
            [row.random.random() if row.random is not None else 0.0 for row in self._rows]
            for _ in range(count)
        ]  # fmt: skip
        return send(numbers, torch.float64, self._base.device)

    def _look(self, block: _Block | None) -> list[Piece]:
        """Look at tokens that were queued; rows that end with them leave."""
        if block is None:
            return []
        rows = [(slot, row) for slot, row in enumerate(block.rows) if not row.done]
        for tokens in block.wait():
            for slot, row in rows:
                if not row.done:
                    self._take(row, tokens[slot], None)
                    self._keep(row)
        pieces = [piece for piece in (_tell(row) for _, row in rows) if piece is not None]
        if any(row.done for row in self._rows):
            self._narrow(self._leave(lambda row: row.done))
        return pieces

    def _choose(self, logits: Tensor, groups: Sequence[_Group], draws: Tensor | None) -> Tensor:
        """Return the next token of each row; rows with one rule are chosen together."""
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for params, slots, seen in groups:
            numbers = draws if params.temperature else None
            if slots is not None:
                numbers = None if numbers is None else numbers[slots]
            found = choose_tokens(logits if slots is None else logits[slots], params, numbers, seen)
            if seen is not None:
                seen.scatter_(1, found.clamp(min=0)[:, None], True)
            if slots is None:
                return found
            tokens[slots] = found
        return tokens

    def _score(self, logits: Tensor, tokens: Tensor) -> dict[int, TokenScore]:
        """Return the scores of the tokens of those rows that want them."""
        scores = {}
        for slot, row in enumerate(self._rows):
            top = row.request.params.logprobs
            if top is not None:
                [scores[slot]] = score_tokens(logits[slot : slot + 1], [max(0, int(tokens[slot]))], top)
        return scores

    def _take(self, row: _Row, token: int, score: TokenScore | None) -> None:
        """Add a token to a row, and end the row if the token does."""
        if token < 0:
            row.error = NAN
            return
        params = row.request.params
        row.token_ids.append(token)
        if score is not None:
            row.scores.append(score)
        self._stats.generated_tokens += 1
        if token in self._eos and not params.ignore_eos:
            row.completion = self._complete(row, "eos")
            return
        if token in row.stop_tokens:
            row.completion = self._complete(row, "stop")
            return
        cut = row.text.add(token) if row.text is not None else None
        if cut is not None:
            row.completion = self._complete(row, "stop", cut)
        elif len(row.token_ids) == params.max_new_tokens:
            row.completion = self._complete(row, "length")

    def _complete(self, row: _Row, reason: str, cut: int | None = None) -> Completion:
        if row.text is not None:
            text = row.text.text[:cut]
        else:
            text = decode(self._tokenizer, row.token_ids[:-1] if reason == "eos" else row.token_ids)
        scores = row.scores if row.request.params.logprobs is not None else None
        return Completion(text, row.token_ids, reason, scores, row.prompt_scores, prompt_state=row.prompt_state)

    def _wants_state(self, row: _Row) -> bool:
        """Tell whether somebody wants the state of a row at its end."""
        return row.request.keep_state or (self._cache is not None and row.request.state is None)

    def _keep(self, row: _Row) -> None:
        """Give a completion its state, and keep it for prompts that go on from it."""
        request, completion, state = row.request, row.completion, row.end_state
        if completion is None or state is None or len(row.token_ids) < row.chosen:
            return
        if request.keep_state:
            row.completion = dataclasses.replace(completion, state=state)
        if self._cache is not None and request.state is None and len(row.token_ids) > 1:
            self._cache.add([*request.ids, *row.token_ids[:-1]], state)

    def _leave(self, leaves: Callable[[_Row], bool]) -> list[int]:
        """Let rows leave, the last rows taking their slots; return who stays, in the new order."""
        order = list(range(len(self._rows)))
        for slot in reversed(range(len(self._rows))):
            if not leaves(self._rows[slot]):
                continue
            last_row, last = self._rows.pop(), order.pop()
            if slot < len(self._rows):
                self.decoder.move(len(self._rows), slot)
                self._rows[slot], order[slot] = last_row, last
        return order

    def _go_on(self, tokens: Tensor, order: list[int], *, unchanged: bool = False) -> None:
        """Feed the rows that stayed their tokens; ``unchanged`` is `Decoder.step`'s."""
        if len(order) < len(tokens):
            tokens = tokens[torch.tensor(order, dtype=torch.int64, device=tokens.device)]
        self._logits = self.decoder.step(tokens, unchanged=unchanged) if self._rows else None

    def _narrow(self, order: list[int]) -> None:
        """Forget the logits of the rows that left."""
        assert self._logits is not None
        index = torch.tensor(order, dtype=torch.int64, device=self._logits.device)
        self._logits = self._logits[index] if self._rows else None

    def _drop_cancelled(self) -> list[Piece]:
        """Return the last pieces of what the caller gave up, and forget it."""
        pieces = []
        for request, begun in self._reader.drop_cancelled():
            completion = Completion("", [], "cancelled")
            pieces += [Piece(request.number, n, "", [], None, completion) for n in range(begun, request.params.n)]
        cancelled = [row for row in self._begun() if row.request.cancelled and not row.done]
        for row in cancelled:
            row.completion = self._complete(row, "cancelled")
        pieces += [piece for piece in map(_tell, cancelled) if piece is not None]
        if any(row.done for row in self._rows):
            self._narrow(self._leave(lambda row: row.done))
        return pieces


def _wants_every_step(row: _Row) -> bool:
    return row.request.keep_state or row.request.params.logprobs is not None


def _groups(rows: Sequence[_Row], device: torch.device) -> list[_Group]:
    """Return the rows by the rule that chooses their tokens; what they have seen comes to lie side by side."""
    rules: dict[tuple[object, ...], list[int]] = {}
    for slot, row in enumerate(rows):
        rules.setdefault(row.request.params.rule, []).append(slot)
    groups = []
    for members in rules.values():
        marks = [seen for slot in members if (seen := rows[slot].seen) is not None]
        together = torch.stack(marks) if marks else None
        if together is not None:
            for slot, seen in zip(members, together, strict=True):
                rows[slot].seen = seen
        slots = send(members, torch.int64, device) if len(rules) > 1 else None
        groups.append(_Group(rows[members[0]].request.params, slots, together))
    return groups


def _tell(row: _Row) -> Piece | None:
    """Return what is new of a row, None if that is nothing or nobody listens."""
    if not row.done and not row.request.stream:
        return None
    if row.completion is None:
        text = row.text.take() if row.text is not None else ""
    else:
        text = row.text.close(row.completion.text) if row.text is not None else row.completion.text
    new, row.told = row.token_ids[row.told :], len(row.token_ids)
    scores = row.scores[len(row.scores) - len(new) :] if row.request.params.logprobs is not None else None
    return Piece(row.request.number, row.sample, text, new, scores, row.completion, row.error)
