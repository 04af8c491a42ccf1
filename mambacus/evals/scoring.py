"""Log-likelihoods of continuations, reading what several requests share only once.

The state after a context is forked over its continuations, which are then read from there. A continuation's first
token is scored by the context's last logits, so a one-token continuation is never read at all. Contexts that begin
alike, with the same worked examples for instance, fork the state after their common beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mambacus.evals.prefixes import Fork, Tokens, shared_prefixes, walk
from mambacus.inference.prompt_passes import padded
from mambacus.models import MambaLM, MambaState

ItemT = TypeVar("ItemT")
LOGIT_BYTES = 256 * 2**20  # float32 logits held at once; long rows are read in steps that keep to it
FORKS_PER_ROW = 4  # rows of one pass over continuations, as a multiple of the batch size
# Of a GPU's memory: for logits, in place of `LOGIT_BYTES`, since steps of few tokens cost as much as long ones there;
# and for the states of one pass over continuations, which are held twice, before it and after it.
LOGIT_SHARE, FORK_SHARE = 1 / 32, 1 / 16
# Padding, in tokens, that one pass may hold rather than be split in two: about what a pass costs besides its tokens.
PADDING_PER_PASS = {"cpu": 64, "cuda": 2048}
STATE_BYTES = 2**30  # of shared beginnings held at once


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    loglikelihood: float
    is_greedy: bool


Pair = tuple[Tokens, Tokens]  # context, continuation
Done = Callable[[Mapping[Pair, Score]], object]


@dataclasses.dataclass
class Counts:
    """What was read.

    Attributes:
        requests: continuations scored.
        tokens_naive: tokens of all requests, each read on its own.
        tokens_read: tokens that were read.
        tokens_padding: padding beside them.
        passes: calls of the model.
        prefixes: beginnings shared by several contexts that were read once each.
    """

    requests: int = 0
    tokens_naive: int = 0
    tokens_read: int = 0
    tokens_padding: int = 0
    passes: int = 0
    prefixes: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts with the tokens saved."""
        return dataclasses.asdict(self) | {"tokens_saved": self.tokens_naive - self.tokens_read}


@dataclasses.dataclass(frozen=True)
class _Row:
    """Tokens to read, and the tokens that should follow each of the last ``len(targets)`` of them."""

    tokens: Tokens
    targets: Tokens

    @property
    def first_scored(self) -> int:
        return len(self.tokens) - len(self.targets)


class Scorer:
    """Scores (context, continuation) pairs of tokens with one model.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one, in evaluation mode and on its device.
        batch_size: contexts, or whole requests, of one pass.
        state_reuse: read a shared context once; off, every request is read whole, for comparison.
        counts: is added to.
        state_bytes: most bytes of states of shared beginnings held at once.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, state_reuse: bool, counts: Counts, state_bytes: int = STATE_BYTES
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if not isinstance(base, MambaLM):
            raise TypeError(f"Scorer: expected a MambaLM, got a {type(base).__name__}")
        self.model = model
        self.device = base.device
        self._vocabulary = base.config.padded_vocab_size
        self.batch_size = batch_size
        self.state_reuse = state_reuse
        self.counts = counts
        self._budget = state_bytes
        self._state_bytes = MambaState.zeros(base.config, dtype=base.dtype).nbytes
        self._logit_bytes, self._fork_rows = LOGIT_BYTES, FORKS_PER_ROW * batch_size
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            self._logit_bytes = int(LOGIT_SHARE * memory)
            self._fork_rows = max(1, min(self._fork_rows, int(FORK_SHARE * memory) // self._state_bytes))

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair], done: Done = lambda scores: None) -> list[Score]:
        """Return the score of each pair, in order.

        Args:
            pairs: context and continuation, at least one token each.
            done: called with the scores found since the last call, by pair.

        Raises:
            ValueError: an empty context or continuation.
        """
        for context, continuation in pairs:
            if not context or not continuation:
                raise ValueError(
                    f"expected at least one token of context and continuation, got {context, continuation}"
                )
        self.counts.requests += len(pairs)
        self.counts.tokens_naive += sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        if not self.state_reuse:
            return self._score_whole(pairs, _no_start(len(pairs)), done)
        shared: dict[Tokens, dict[Tokens, None]] = {}  # context -> its continuations in order, each once
        for context, continuation in pairs:
            shared.setdefault(context, {})[continuation] = None
        contexts = [*shared]
        found: dict[Pair, Score] = {}
        for fork in self.forks(contexts):
            found |= self._score_fork(fork, contexts, shared, done)
        return [found[pair] for pair in pairs]

    def warm_up(self) -> None:
        """Do every kind of pass once with made-up requests, uncounted: the first of a kind loads its kernels."""
        often = PADDING_PER_PASS.get(self.device.type, PADDING_PER_PASS["cuda"]) // 16 if self.state_reuse else 1
        shared = tuple(place % self._vocabulary for place in range(1, 17)) * often  # long enough to be read once
        contexts = [(*shared, *range(place % 3 + 1), place) for place in range(8)]
        pairs = [(context, (1,) * length) for context in contexts for length in (1, 2, 4)]
        counts, self.counts = self.counts, Counts()
        try:
            self.score(pairs)
        finally:
            self.counts = counts

    def forks(self, sequences: Sequence[Tokens]) -> Iterator[Fork]:
        """Read the beginnings that ``sequences`` share; at least the last token of each is left to be read.

        Args:
            sequences: of at least one token each.

        Yields:
            Groups of sequences with the states they go on from; every sequence is in one group.
        """
        least_saving = PADDING_PER_PASS.get(self.device.type, PADDING_PER_PASS["cuda"])
        root = shared_prefixes([sequence[:-1] for sequence in sequences], least_saving)
        return walk(root, self._read_segments, self._state_bytes, self._budget)

    @torch.no_grad()
    def _read_segments(self, segments: Sequence[Tokens], state: MambaState | None) -> MambaState:
        """Return the states after ``segments`` (longest first), each read from its row of ``state``."""
        self.counts.prefixes += len(segments)
        states = []
        begin = 0
        for batch in self._batches(segments, len, self.batch_size):  # sorting is stable: the batches are slices
            rows = range(begin, begin + len(batch))
            states.append(self._prefill(batch, None if state is None else state.select(rows))[1])
            begin += len(batch)
        return MambaState.cat(states)

    def _score_fork(
        self,
        fork: Fork,
        contexts: Sequence[Tokens],
        shared: Mapping[Tokens, Mapping[Tokens, None]],
        done: Done,
    ) -> dict[Pair, Score]:
        """Score all continuations of the contexts of one fork."""
        start = {contexts[member]: row for row, member in enumerate(fork.members)}
        lone = [(context, next(iter(shared[context]))) for context in start if len(shared[context]) == 1]
        lone_fork = _part(fork, [start[context] for context, _ in lone])
        found = dict(zip(lone, self._score_whole(lone, lone_fork, done), strict=True))
        several = [context for context in start if len(shared[context]) > 1]
        rest = {context: len(context) - fork.depths[place] for context, place in start.items()}
        for batch in self._batches(several, rest.__getitem__, self.batch_size):
            pending = [(context, continuation) for context in batch for continuation in shared[context]]
            part = _part(fork, [start[context] for context in batch])
            scores = dict(zip(pending, self._score_forked(batch, part, pending), strict=True))
            found |= scores
            done(scores)
        return found

    def _score_whole(self, pairs: Sequence[Pair], fork: Fork, done: Done) -> list[Score]:
        """Read each request on its own, long ones first so that a batch holds rows of nearly equal length."""
        rows = [
            _Row((context + continuation[:-1])[depth:], continuation)
            for (context, continuation), depth in zip(pairs, fork.depths, strict=True)
        ]
        scores: dict[int, Score] = {}
        for indices in self._batches(range(len(rows)), lambda index: len(rows[index].tokens), self.batch_size):
            state = None if fork.state is None else fork.state.select([fork.rows[index] for index in indices])
            scores |= zip(indices, self._read([rows[index] for index in indices], state), strict=True)
            done({pairs[index]: scores[index] for index in indices})
        return [scores[index] for index in range(len(rows))]

    def _score_forked(self, contexts: Sequence[Tokens], fork: Fork, pairs: Sequence[Pair]) -> list[Score]:
        """Read ``contexts`` (longest rest first) in one pass, then what follows each continuation's first token."""
        position = {context: row for row, context in enumerate(contexts)}
        owners = [position[context] for context, _ in pairs]
        rests = [context[depth:] for context, depth in zip(contexts, fork.depths, strict=True)]
        begun = None if fork.state is None else fork.state.select(fork.rows)
        logits, state = self._prefill(rests, begun)  # (contexts, vocabulary)
        owner = torch.tensor(owners, device=logits.device)
        first = torch.tensor([continuation[0] for _, continuation in pairs], device=logits.device)
        log_probability = logits[owner, first] - logits.logsumexp(-1)[owner]
        is_top = logits.argmax(-1)[owner] == first
        scores = [Score(*found) for found in zip(log_probability.tolist(), is_top.tolist(), strict=True)]
        longer = [index for index, (_, continuation) in enumerate(pairs) if len(continuation) > 1]
        for indices in self._batches(longer, lambda index: len(pairs[index][1]), self._fork_rows):
            rows = [_Row(pairs[index][1][:-1], pairs[index][1][1:]) for index in indices]
            forks = state.select(owner[indices])
            for index, rest in zip(indices, self._read(rows, forks), strict=True):
                scores[index] = Score(
                    scores[index].loglikelihood + rest.loglikelihood, scores[index].is_greedy and rest.is_greedy
                )
        return scores

    def _prefill(self, contexts: Sequence[Tokens], state: MambaState | None) -> tuple[Tensor, MambaState]:
        """Return the logits after each context, (contexts, vocabulary), and the state there; both follow ``state``."""
        inputs = padded(contexts, self.device)
        out = self.model(**inputs, state=state)
        self._count(contexts)
        return out.logits[:, 0].float(), out.state

    def _read(self, rows: Sequence[_Row], state: MambaState | None) -> list[Score]:
        """Score rows (longest first) in one pass, or in steps from state to state where the logits would not fit."""
        longest = len(rows[0].tokens)
        fitting = max(1, self._logit_bytes // (4 * len(rows) * self._vocabulary))
        step = longest if max(len(row.targets) for row in rows) <= fitting else fitting
        totals = torch.zeros(len(rows), dtype=torch.float64)
        greedy = torch.ones(len(rows), dtype=torch.bool)
        for begin in range(0, longest, step):
            live = [row for row in rows if len(row.tokens) > begin]  # the first rows: they are the longest
            if state is not None and state.batch > len(live):
                state = state.select(range(len(live)))
            pieces = [row.tokens[begin : begin + step] for row in live]
            inputs = padded(pieces, self.device)
            positions, targets, mask = _scored(live, begin, begin + step)
            out = self.model(**inputs | {"logits_at": positions.to(self.device)}, state=state)
            log_probability, is_top = _judge(out.logits, targets.to(self.device))
            totals[: len(live)] += log_probability.cpu().double().masked_fill(~mask, 0.0).sum(1)
            greedy[: len(live)] &= (is_top.cpu() | ~mask).all(1)
            state = out.state
            self._count(pieces)
        return [Score(*found) for found in zip(totals.tolist(), greedy.tolist(), strict=True)]

    def _batches(self, items: Sequence[ItemT], length: Callable[[ItemT], int], size: int) -> Iterator[list[ItemT]]:
        """Yield ``items`` longest first, at most ``size`` at once and of lengths near enough that little is padded."""
        allowed = PADDING_PER_PASS.get(self.device.type, PADDING_PER_PASS["cuda"])
        batch: list[ItemT] = []
        padding = 0
        for item in sorted(items, key=length, reverse=True):
            missing = length(batch[0]) - length(item) if batch else 0
            if batch and (len(batch) == size or padding + missing > allowed):
                yield batch
                batch, padding, missing = [], 0, 0
            batch.append(item)
            padding += missing
        if batch:
            yield batch

    def _count(self, pieces: Sequence[Tokens]) -> None:
        read = sum(map(len, pieces))
        self.counts.tokens_read += read
        self.counts.tokens_padding += len(pieces) * max(map(len, pieces)) - read
        self.counts.passes += 1


def _no_start(requests: int) -> Fork:
    """Return the fork of requests that are read from their first token."""
    return Fork([*range(requests)], [0] * requests, [0] * requests, None)


def _part(fork: Fork, places: Sequence[int]) -> Fork:
    """Return some of a fork's sequences, by their places in it."""
    return Fork(
        [fork.members[place] for place in places],
        [fork.depths[place] for place in places],
        [fork.rows[place] for place in places],
        fork.state,
    )


def _scored(rows: Sequence[_Row], begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the rows are scored between the positions ``begin`` and ``end``.

    Returns:
        Positions counted from ``begin``, target tokens, both int64 (rows, k), and which of them are real, (rows, k).
    """
    firsts = [max(begin, row.first_scored) for row in rows]
    counts = [max(0, min(end, len(row.tokens)) - first) for row, first in zip(rows, firsts, strict=True)]
    most = max(counts)
    positions, targets = [], []
    for row, first, count in zip(rows, firsts, counts, strict=True):
        rest = [0] * (most - count)
        positions.append([*range(first - begin, first - begin + count), *rest])
        targets.append([*row.targets[first - row.first_scored :][:count], *rest])
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    return torch.tensor(positions, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), mask


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of ``targets`` (...) under ``logits`` (..., vocabulary), and which are the likeliest."""
    logits = logits.float()
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    is_top = chosen == logits.amax(-1)  # ten times as quick as argmax, which is left to decide between equals
    is_top[is_top.clone()] = logits[is_top].argmax(-1) == targets[is_top]
    return chosen - logits.logsumexp(-1), is_top
