"""Prompts on their way into states: in batches of unequal lengths, in chunks, from and to cached states."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mambacus.inference.completion import TokenScore
from mambacus.inference.prefix_cache import PrefixCache
from mambacus.inference.prompt_passes import PromptPasses
from mambacus.inference.sampling import SamplingParams, generator_for
from mambacus.models import MambaLM, MambaState
from mambacus.models.primed import PrimedModel

SCORED_TOKENS = 512  # positions whose logits over the vocabulary are held at once
# Tokens that a pass on a CPU takes besides its own: where splitting one saves more padding, it is split. A GPU waits
# longer for the launches of a pass than for padding.
PASS_TOKENS = 128


@dataclasses.dataclass
class Request:
    """One prompt to complete.

    Attributes:
        ids: its tokens, at least one.
        params: how to complete it.
        number: the caller's number for it.
        state: read the tokens after this one (one row); such a prompt takes no part in the prefix cache.
        state_ids: the tokens behind it, as far as they are known; a repetition penalty applies to them too.
        stream: tell of every token, not only of whole completions.
        keep_state: completions carry their state.
        cancelled: set by the caller, from any thread, to give it up.
        cached: how many of ``ids`` were not read, since the prefix cache had a state after them.
    """

    ids: Sequence[int]
    params: SamplingParams
    number: int = 0
    state: MambaState | None = None
    state_ids: frozenset[int] = frozenset()
    stream: bool = False
    keep_state: bool = False
    cancelled: bool = False
    cached: int = 0

    def generator(self, sample: int) -> random.Random | None:
        """Return the source of randomness of one of its completions, None where nothing is drawn."""
        return generator_for(self.params.seed, self.ids, sample) if self.params.temperature else None


@dataclasses.dataclass(eq=False)
class _Reading:
    """A request being read: how far, and where a state is to be taken on the way."""

    request: Request
    position: int
    state: MambaState | None
    branch: int | None = None
    scores: list[TokenScore | None] | None = None

    @property
    def end(self) -> int:
        return self.branch or len(self.request.ids)

    @property
    def left(self) -> int:
        return self.end - self.position


@dataclasses.dataclass
class Ready:
    """A request that was read: its completions can begin.

    Attributes:
        request: it.
        logits: after its last token, float32 (1, vocabulary).
        state: after its last token, one row.
        scores: of its tokens, if asked for.
        begun: completions that have begun.
    """

    request: Request
    logits: Tensor
    state: MambaState
    scores: list[TokenScore | None] | None = None
    begun: int = 0


class Reader:
    """Reads prompts, a chunk at a time.

    Args:
        model: what reads: a `MambaLM` or a ``peft.PeftModel``.
        base: the `MambaLM` in it.
        passes: does the forward passes, but for prompts whose tokens are scored.
        most_tokens: most tokens of one forward pass.
        cache: states of texts that were read before, or None.
        on_read: called with the number of tokens that each pass has read.
    """

    def __init__(
        self,
        model: nn.Module,
        base: MambaLM,
        passes: PromptPasses,
        most_tokens: int,
        cache: PrefixCache | None,
        on_read: Callable[[int], None],
    ) -> None:
        self._model, self._base, self._run, self._most_tokens = model, base, passes.run, most_tokens
        self._cache, self._on_read = cache, on_read
        self._waiting: deque[_Reading] = deque()
        self._passes: Iterator[None] | None = None
        self._group: list[_Reading] = []  # those that have not ended
        self.ready: deque[Ready] = deque()

    def __len__(self) -> int:
        """Return the number of requests that are not ready yet."""
        return len(self._waiting) + len(self._group)

    @property
    def goes_on(self) -> bool:
        """Tell whether prompts are read in part."""
        return bool(self._group)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self._waiting.append(_Reading(request, 0, request.state, scores=[None] if _scored(request) else None))

    def drop_cancelled(self) -> list[tuple[Request, int]]:
        """Forget the requests that were cancelled; return them with how many of their completions have begun.

        Those in a batch that is being read leave at once if all that is left of it was cancelled.
        """
        dropped = [(item.request, 0) for item in self._waiting if item.request.cancelled]
        dropped += [(item.request, item.begun) for item in self.ready if item.request.cancelled]
        if dropped:
            self._waiting = deque(item for item in self._waiting if not item.request.cancelled)
            self.ready = deque(item for item in self.ready if not item.request.cancelled)
        if self._group and all(item.request.cancelled for item in self._group):
            dropped += [(item.request, 0) for item in self._group]
            self._passes, self._group = None, []
        return dropped

    def read(self, most_prompts: int) -> bool:
        """Do one forward pass, for prompts begun before or for up to ``most_prompts`` new ones; tell if there was one.

        Prompts that it completes are appended to ``ready``.
        """
        if self._lets_join(most_prompts):
            self._waiting.extendleft(reversed(self._group))
            self._passes, self._group = None, []
        if self._passes is None:
            self._group = self._next_group(most_prompts)
            if not self._group:
                return False
            alone = self._group[0]
            self._passes = self._score(alone) if alone.scores is not None else self._read_group(tuple(self._group))
        if next(self._passes, self) is self:
            self._passes, self._group = None, []
            return self.read(most_prompts) if not self.ready else True
        return True

    def _lets_join(self, most: int) -> bool:
        """Return whether the next prompt is so much shorter than what is being read that it must not wait for it."""
        if not self._group or not self._waiting or len(self._group) >= most:
            return False
        next_one = self._waiting[0]
        alone = next_one.scores is not None or self._group[0].scores is not None
        return not alone and 2 * next_one.left <= max(item.left for item in self._group)

    def _next_group(self, most: int) -> list[_Reading]:
        """Take what is read together: neighbours in the queue, longest first; a scored prompt is read alone."""
        group: list[_Reading] = []
        while self._waiting and len(group) < most:
            item = self._waiting[0]
            if item.scores is not None and group:
                break
            self._waiting.popleft()
            if item.position == 0 and item.state is None and item.scores is None and self._cache is not None:
                plan = self._cache.plan(item.request.ids)
                item.branch = plan.branch
                if plan.entry is not None:
                    item.position, item.state = len(plan.entry.tokens), plan.entry.state
                    item.request.cached = item.position
                    if item.position == len(item.request.ids):
                        assert plan.entry.logits is not None
                        self.ready.append(Ready(item.request, plan.entry.logits, plan.entry.state))
                        continue
            group.append(item)
            if item.scores is not None:
                break
        return sorted(group, key=lambda item: -item.left)

    def _read_group(self, group: Sequence[_Reading]) -> Iterator[None]:
        """Read a group, longest first, in chunks of columns; yield after each.

        A prompt that ends is padded on the right to its chunk's end and then leaves the batch; as the prompts get
        shorter, those are always the last rows.
        """
        parts = [item.request.ids[item.position : item.end] for item in group]
        state = self._join([item.state for item in group])
        start = 0
        while active := sum(len(part) > start for part in parts):
            left = [len(part) - start for part in parts[:active]]
            width = min(left[0], max(1, self._most_tokens // active))
            if self._base.device.type == "cpu":
                width = unpadded_width(left, width)
            chunk = [part[start : start + width] for part in parts[:active]]
            out = self._run(chunk, state)
            staying = sum(len(part) > start + width for part in parts)
            for row, item in enumerate(group[:staying]):
                item.position, item.state = item.position + width, out.state.narrow(row, 1)
            for row in range(staying, active):
                self._end(group[row], out.logits[row], out.state.narrow(row, 1))
            state = out.state.narrow(0, staying) if staying else None
            self._on_read(sum(map(len, chunk)))
            start += width
            yield

    def _join(self, states: Sequence[MambaState | None]) -> MambaState | None:
        """Return the states as one batch; None where no row has one."""
        if not any(states):
            return None
        if isinstance(self._model, PrimedModel):
            start = self._model.start()
        else:
            start = MambaState.zeros(self._base.config, 1, self._base.device, self._base.dtype)
        return MambaState.cat([start if state is None else state for state in states])

    def _end(self, item: _Reading, logits: Tensor, state: MambaState) -> None:
        """Take note of a prompt that was read to its branch or to its end; ``logits`` is (1, vocabulary)."""
        ids, item.position, item.state = item.request.ids, item.end, state
        self._group.remove(item)
        if self._cache is not None and item.request.state is None:
            self._cache.add(ids[: item.end], state, logits)
        if item.branch is not None:
            item.branch = None
            self._waiting.appendleft(item)
            return
        self.ready.append(Ready(item.request, logits, state, item.scores))

    def _score(self, item: _Reading) -> Iterator[None]:
        """Read one prompt and score each of its tokens."""
        ids, state, scores = item.request.ids, item.state, item.scores
        assert scores is not None
        width = min(self._most_tokens, SCORED_TOKENS)
        for start in range(0, len(ids), width):
            chunk = ids[start : start + width]
            out = self._model(input_ids=torch.tensor([chunk], device=self._base.device), state=state)
            state = out.state
            following = ids[start + 1 : start + width + 1]
            scores += score_tokens(out.logits[0, : len(following)], following, item.request.params.logprobs or 0)
            self._on_read(len(chunk))
            if start + width >= len(ids):
                self._end(item, out.logits[:, -1], out.state)
            yield


def unpadded_width(lengths: Sequence[int], width: int) -> int:
    """Return how many columns of rows to read at once, at most ``width``, so that little padding is read.

    Args:
        lengths: tokens of each row, longest first; those that end within a pass are padded to its end.
        width: columns that are to be read, in two passes if that saves more than `PASS_TOKENS` of padding.
    """
    ends = np.array([length for length in lengths if length < width])  # falling
    if len(ends) == 0:
        return width
    saved = np.arange(len(ends), 0, -1) * (width - ends)  # by a pass that ends with a row: of it and all shorter ones
    best = int(saved.argmax())
    return int(ends[best]) if saved[best] > PASS_TOKENS else width


def read_alone(
    passes: PromptPasses, ids: Sequence[int], state: MambaState | None, most_tokens: int
) -> Iterator[tuple[int, MambaState]]:
    """Read ``ids`` in chunks of ``most_tokens``; yield after each its length and the state."""
    for start in range(0, len(ids), most_tokens):
        chunk = ids[start : start + most_tokens]
        state = passes.run([chunk], state).state
        yield len(chunk), state


def score_tokens(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Return the score of each token by the logits (tokens, vocabulary) it was chosen from, with the ``top`` best."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best, ids = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    return [
        TokenScore(token, logprob, tuple(zip(places, values, strict=True)))
        for token, logprob, places, values in zip(tokens, chosen, ids, best, strict=True)
    ]


def _scored(request: Request) -> bool:
    return request.params.prompt_logprobs
