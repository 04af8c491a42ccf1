"""The rows that are being decoded: their states in memory that stays where it is, and the step that moves all on."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambacus.inference.fused import fused_weights
from mambacus.inference.sampling import SamplingParams, choose_tokens
from mambacus.inference.watch import Watch
from mambacus.models import MambaLM, MambaState
from mambacus.models.mamba import MambaMixer
from mambacus.models.primed import PrimedModel
from mambacus.ops.decode_step import StepWeights, decode_step
from mambacus.ops.tape import Tape
from mambacus.runtime.graphs import CudaRecorder, Recorder

_log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # batch sizes of recorded steps
TAPED_ROWS = 16  # steps on a CPU of up to so many rows are kept as tapes, whatever the model
# Most numbers of a layer (rows x d_inner) in a taped step of more rows: beyond, the kernels take far longer than Python
# and the tapes much memory. Such tapes are made for multiples of `ROUNDED_ROWS` only.
TAPED_NUMBERS = 64 * 512
ROUNDED_ROWS = 8
# A tape takes as long to record as several steps, and rows that end one after the other make many sizes. So a size
# takes the tape of at most twice as many rows first, if there is one; numbers differ by rounding, as with any size.
LEAST_LENT_ROWS = 9  # fewer take far less than twice as many
LOANS = 8  # steps until a size gets a tape of its own
GREEDY = SamplingParams()
MOST_MET = 1024  # ways to draw that are remembered
MOST_CHOICES = 32  # recorded ways to draw tokens; the least recently used leaves
# Most numbers (rows x vocabulary) of a recorded draw: beyond, the GPU takes far longer than the host, and the memory of
# graphs, which nothing else may use, would grow by several times that.
MOST_DRAWN_NUMBERS = 2**23
_FIRST_ROWS = 4  # rows that memory is made for at first; doubled when they are taken


class Taped(NamedTuple):
    """A recorded step on a CPU, the tokens (rows,) it reads, and the logits (rows, vocabulary) it writes."""

    tape: Tape
    inputs: Tensor
    logits: Tensor


class Choice(NamedTuple):
    """A recorded choice from a step's logits, the numbers (rows,) it draws by and the tokens (rows,) it writes."""

    replay: Callable[[], None]
    draws: Tensor
    tokens: Tensor


class Decoder:
    """States of up to ``capacity`` rows, and one decoding step for the first ``n`` of them.

    Every layer's states lie side by side, so the first n rows of the memory are a batch as they stand: a row that
    ends is replaced by the last one, and no other state moves. On a GPU the memory never moves either, and the step
    is recorded once for each of `BUCKETS` as a CUDA graph, which launches all its kernels at once; rows between n
    and the bucket's size compute what nobody reads. What is recorded is the fused step of
    `mambacus.ops.decode_step`, or where that does not fit the model, the model's own; the same is run where graphs
    are not wanted. On a CPU the step of a few rows is recorded as a `Tape`. A model with an adapter attached is
    stepped without graphs and tapes, since the adapter may be changed or switched off between two steps.

    Args:
        model: what is stepped: a `MambaLM` or a ``peft.PeftModel``.
        base: the `MambaLM` in it.
        capacity: most rows.
        graphs: record CUDA graphs where the model allows it.
        recorder: makes the recordings; None for CUDA graphs on a GPU.

    Attributes:
        unfused: why the step looked at last on a GPU is that of the model's modules; None if it is the fused one.
    """

    def __init__(
        self, model: nn.Module, base: MambaLM, capacity: int, *, graphs: bool = True, recorder: Recorder | None = None
    ) -> None:
        # From a state, a primed model is the model in it.
        self._model = model.model if isinstance(model, PrimedModel) else model
        self._base, self.capacity = base, capacity
        self._pool: MambaState | None = None
        self._graphs_wanted = graphs and self._model is base
        # bucket, whether it chooses the next token -> its replay, the logits or tokens it writes
        self._graphs: dict[tuple[int, bool], tuple[Callable[[], None], Tensor]] = {}
        self._choices: dict[tuple[int, tuple[object, ...]], Choice] = {}  # bucket, rule; last the one used last
        self._met: set[tuple[int, tuple[object, ...]]] = set()  # ways to draw that were used once, not recorded yet
        self._fused: dict[tuple[int, bool], StepWeights | str] = {}  # rows, autocast -> for steps without a graph
        self._tapes: dict[int, Taped | None] = {}  # rows -> None after the first step
        self._loans: dict[int, int] = {}  # rows -> steps on a larger tape
        self._watch: Watch | None = None  # the model that the tapes are of
        self._right: tuple[list[Tensor], Tensor] | None = None  # what layers keep of A_log, and that A_log
        # Its graphs share memory: one step's numbers are read before the next one's are written.
        self._given_recorder = recorder
        self._recorder = recorder
        self._input: Tensor | None = None
        self.unfused: str | None = None
        self._weights = (0, torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def begin(self) -> None:
        """Take notice of numbers written into ``A_log`` through ``.data``, which torch does not count as a change.

        Call it before a run. Steps need no such look at other parameters: kernels read them where they lie.
        """
        mixers = [module for module in self._base.modules() if isinstance(module, MambaMixer)]
        kept = [mixer.decay() for mixer in mixers]
        if self._base.device.type != "cpu" and mixers:  # one look at all layers: each is a wait for the GPU
            now = torch.stack([mixer.A_log for mixer in mixers])
            if self._right is not None and all(map(is_, kept, self._right[0])) and torch.equal(now, self._right[1]):
                return
            if torch.equal(torch.stack(kept), -torch.exp(now)):
                self._right = (kept, now)
                return
        for mixer, decay in zip(mixers, kept, strict=True):
            if not torch.equal(decay, -torch.exp(mixer.A_log)):
                torch.autograd.graph.increment_version(mixer.A_log)

    def put(self, state: MambaState, slot: int, count: int) -> None:
        """Write ``state`` (one row) into ``count`` slots from ``slot`` on."""
        pool = self._room(slot + count)
        slots = slice(slot, slot + count)
        pool.conv_state[:, slots] = state.conv_state
        pool.ssm_state[:, slots] = state.ssm_state
        pool.tokens[slots] = state.tokens

    def move(self, source: int, target: int) -> None:
        """Copy the row in slot ``source`` to slot ``target``."""
        pool = self._room(1)
        pool.conv_state[:, target] = pool.conv_state[:, source]
        pool.ssm_state[:, target] = pool.ssm_state[:, source]
        pool.tokens[target] = pool.tokens[source]

    def state(self, slot: int) -> MambaState:
        """Return a copy of the state of the row in ``slot``."""
        return self._room(1).select([slot])

    def step(self, tokens: Tensor, *, unchanged: bool = False) -> Tensor:
        """Read one token in each of the first ``len(tokens)`` slots.

        Args:
            tokens: int64 (rows,).
            unchanged: nobody else's code ran since the step before: the model need not be looked at again.

        Returns:
            The logits after it, float32 (rows, vocabulary); with graphs, valid until the next step.
        """
        rows = len(tokens)
        pool = self._room(rows)
        recorded = self._has_graphs(tokens)
        if recorded or tokens.is_cuda:
            if not self._is_plain(unchanged=unchanged):
                return self._run(tokens[:, None], _first(pool, rows))
            return self._replay(tokens) if recorded else self._step_now(tokens, _first(pool, rows))
        size = rows if rows <= TAPED_ROWS else min(-(-rows // ROUNDED_ROWS) * ROUNDED_ROWS, self.capacity)
        few = size <= max(TAPED_ROWS, TAPED_NUMBERS // self._base.config.d_inner)
        if few and tokens.device.type == "cpu" and self._is_plain(unchanged=unchanged):
            return self._play(tokens, size)
        return self._run(tokens[:, None], _first(pool, rows))

    def follow(
        self, tokens: Tensor, count: int, params: SamplingParams = GREEDY, draws: Tensor | None = None
    ) -> Tensor:
        """Read one token in each of the first ``len(tokens)`` slots, then ``count`` - 1 times the one chosen after it.

        On a GPU the likeliest token is chosen in the recorded step, and a way to draw is recorded when it is met again,
        but with a bias or very many numbers: so that a token costs the host little. The model is looked at once.

        Args:
            tokens: int64 (rows,).
            count: steps.
            params: how all rows' tokens are chosen, without a repetition penalty.
            draws: float64 (count, rows), as `choose_tokens` takes them; not read when greedy.

        Returns:
            The tokens chosen after each step, int64 (count, rows), the last of them not read; -1 after NaN.
        """
        rows = len(tokens)
        chosen = torch.empty(count, rows, dtype=torch.int64, device=tokens.device)
        self._room(rows)
        recorded = self._has_graphs(tokens)
        if recorded and self._is_plain():
            if params.rule == GREEDY.rule:
                return self._follow_likeliest(tokens, chosen)
            size = self._bucket(rows)
            numbers = size * self._base.config.padded_vocab_size
            may_record = not params.logit_bias and numbers <= MOST_DRAWN_NUMBERS
            if draws is not None and may_record and self._is_met((size, params.rule)):
                return self._follow_drawn(tokens, chosen, self._choice(size, params), draws)
        for number, row in enumerate(chosen):
            logits = self.step(tokens, unchanged=recorded or number > 0)
            row.copy_(choose_tokens(logits, params, None if draws is None else draws[number]))
            tokens = row.clamp(min=0)
        return chosen

    def _is_met(self, way: tuple[int, tuple[object, ...]]) -> bool:
        """Tell whether a way to draw was used before; recording takes as long as several tokens."""
        if way in self._met or way in self._choices:
            return True
        if len(self._met) >= MOST_MET:
            self._met.clear()
        self._met.add(way)
        return False

    def _follow_likeliest(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        replay, likeliest = self._fed(tokens, follows=True)
        for row in chosen:
            replay()
            row.copy_(likeliest)
        return chosen

    def _follow_drawn(self, tokens: Tensor, chosen: Tensor, choice: Choice, draws: Tensor) -> Tensor:
        replay, _ = self._fed(tokens, follows=False)
        numbers, found = choice.draws[: len(tokens)], choice.tokens[: len(tokens)]
        for row, drawn in zip(chosen, draws, strict=True):
            numbers.copy_(drawn)
            replay()
            choice.replay()
            row.copy_(found)
        return chosen

    def _choice(self, size: int, params: SamplingParams) -> Choice:
        """Return the recorded choice from the logits of a step of ``size`` rows, which makes the tokens the next input.

        It is a recording of its own and not a part of the step's: there are as many rules as callers like, and this
        one is some forty small kernels, recorded in the time of a few tokens.
        """
        key = (size, params.rule)
        choice = self._choices.pop(key, None)
        if choice is None:
            if len(self._choices) >= MOST_CHOICES:
                del self._choices[next(iter(self._choices))]
            choice = self._record_choice(size, params)
        self._choices[key] = choice
        return choice

    def _record_choice(self, size: int, params: SamplingParams) -> Choice:
        _, logits = self._recorded(size, follows=False)
        assert self._input is not None and self._recorder is not None
        inputs = self._input[:size]
        with torch.inference_mode(False):
            draws = torch.zeros(size, dtype=torch.float64, device=inputs.device)

        def choose() -> Tensor:
            tokens = choose_tokens(logits, params, draws)
            torch.clamp(tokens, min=0, out=inputs)
            return tokens

        self._recorder.warm_up(choose)
        replay, tokens = self._recorder.record(choose)
        return Choice(replay, draws, tokens)

    def _has_graphs(self, tokens: Tensor) -> bool:
        """Tell whether steps of these tokens are recorded where the model allows it."""
        return self._graphs_wanted and (tokens.is_cuda or self._given_recorder is not None)

    def _step_now(self, tokens: Tensor, state: MambaState) -> Tensor:
        """Make the step on a GPU without a graph: its kernels are those that a graph would hold."""
        key = (len(tokens), torch.is_autocast_enabled("cuda"))
        if key not in self._fused:
            self._fused[key] = self._find_fused(len(tokens))
        weights = self._fused[key]
        if isinstance(weights, str):
            return self._run(tokens[:, None], state)
        return decode_step(weights, tokens, state.conv_state, state.ssm_state, state.tokens, backend="cuda")

    def _find_fused(self, rows: int) -> StepWeights | str:
        weights = fused_weights(self._base, rows)
        self.unfused = weights if isinstance(weights, str) else None
        _log.info("a step of %d rows: %s", rows, f"not fused: {weights}" if self.unfused else "fused")
        return weights

    def _play(self, tokens: Tensor, size: int) -> Tensor:
        """Make the step from the tape of ``size`` rows, or one that is lent, or record it.

        The first step of a size without either runs freely, the second is recorded. Rows beyond those of ``tokens``
        compute what nobody reads.
        """
        rows, state = len(tokens), _first(self._room(size), size)
        taped = self._tapes.get(size) or self._lent(size)
        if taped is None and size not in self._tapes:
            self._tapes[size] = None
            return self._run(tokens[:, None], _first(state, rows))
        if taped is None:
            with torch.inference_mode(False), torch.no_grad():  # else it could be repeated in that mode alone
                inputs = torch.zeros(size, dtype=tokens.dtype)
                inputs[:rows] = tokens
                tape, logits = Tape.record(lambda: self._run(inputs[:, None], state))
            self._tapes[size] = Taped(tape, inputs, logits)
            return logits[:rows].clone()
        taped.inputs[:rows] = tokens
        taped.tape.replay()
        return taped.logits[:rows].clone()

    def _lent(self, size: int) -> Taped | None:
        """Return the smallest tape of more rows that a size without one may use."""
        larger = [rows for rows, taped in self._tapes.items() if taped is not None and size < rows <= 2 * size]
        if size < LEAST_LENT_ROWS or not larger or self._loans.get(size, 0) >= LOANS:
            return None
        self._loans[size] = self._loans.get(size, 0) + 1
        return self._tapes[min(larger)]

    def _is_plain(self, *, unchanged: bool = False) -> bool:
        """Tell whether the step is nothing but the model's own; if the model changed, forget what was recorded."""
        if self._model is not self._base:
            return False
        if self._watch is None or not (unchanged or self._watch.unchanged()):
            self._watch = Watch(self._base)
            self._forget()
        return self._watch.plain

    def _forget(self) -> None:
        """Forget all that was recorded; what a graph wrote may be held yet, so the next ones get other memory."""
        for recorded in (self._graphs, self._choices, self._fused, self._tapes, self._loans, self._met):
            recorded.clear()
        self._recorder = self._given_recorder

    def _run(self, tokens: Tensor, state: MambaState) -> Tensor:
        out = self._model(input_ids=tokens, state=state, reuse_state=True)
        state.tokens.copy_(out.state.tokens)
        logits: Tensor = out.logits[:, 0]
        return logits

    def _room(self, rows: int) -> MambaState:
        """Return memory for at least ``rows`` rows of the model as it is now."""
        weight = self._base.backbone.norm_f.weight  # no adapter and no quantisation replaces it
        weights = (weight.data_ptr(), weight.device, weight.dtype)
        if self._pool is not None and self._pool.batch >= rows and weights == self._weights:
            return self._pool
        # On a GPU everything is made at once: graphs remember addresses.
        fixed = weight.is_cuda or self._given_recorder is not None
        size = self.capacity if fixed else min(self.capacity, max(_FIRST_ROWS, 2 * rows))
        with torch.inference_mode(False):  # else nothing outside that mode could write into it
            pool = MambaState.zeros(self._base.config, size, weight.device, weight.dtype)
            self._input = torch.zeros(size, dtype=torch.int64, device=weight.device) if fixed else None
        if self._pool is not None and weights == self._weights:
            kept = self._pool.batch
            pool.conv_state[:, :kept] = self._pool.conv_state
            pool.ssm_state[:, :kept] = self._pool.ssm_state
            pool.tokens[:kept] = self._pool.tokens
        self._pool, self._weights = pool, weights
        self._forget()
        return pool

    def _replay(self, tokens: Tensor) -> Tensor:
        replay, logits = self._fed(tokens, follows=False)
        replay()
        return logits

    def _fed(self, tokens: Tensor, *, follows: bool) -> tuple[Callable[[], None], Tensor]:
        """Write ``tokens`` where the recorded step reads them; return its replay, and what it writes for their rows."""
        replay, written = self._recorded(len(tokens), follows=follows)
        assert self._input is not None
        self._input[: len(tokens)] = tokens
        return replay, written[: len(tokens)]

    def _recorded(self, rows: int, *, follows: bool) -> tuple[Callable[[], None], Tensor]:
        """Return the replay of a step of at least ``rows`` rows, and what it writes."""
        key = (self._bucket(rows), follows)
        if key not in self._graphs:
            self._graphs[key] = self._record(*key)
        return self._graphs[key]

    def _bucket(self, rows: int) -> int:
        """Return how many rows the recorded step of at least ``rows`` has."""
        sizes = [size for size in BUCKETS if size < self.capacity] + [self.capacity]
        return sizes[bisect.bisect_left(sizes, rows)]

    def _record(self, size: int, follows: bool) -> tuple[Callable[[], None], Tensor]:
        """Record the step of ``size`` rows; the states are as before afterwards.

        Its result is the logits; or if it ``follows``, the likeliest tokens, which it also makes the next input.
        """
        assert self._pool is not None and self._input is not None
        state, inputs = _first(self._pool, size), self._input[:size]
        before = state.select(range(size))
        weights = self._find_fused(size)

        def step() -> Tensor:
            if isinstance(weights, str):
                logits = self._run(inputs[:, None], state)
            else:
                logits = decode_step(weights, inputs, state.conv_state, state.ssm_state, state.tokens, backend="cuda")
            if not follows:
                return logits
            likeliest = choose_tokens(logits, GREEDY, None)
            torch.clamp(likeliest, min=0, out=inputs)
            return likeliest

        self._recorder = self._recorder or CudaRecorder(inputs.device)
        for _ in range(2):  # compile and load every kernel, make the libraries' workspaces
            self._recorder.warm_up(step)
        recording = self._recorder.record(step)
        state.conv_state.copy_(before.conv_state)
        state.ssm_state.copy_(before.ssm_state)
        state.tokens.copy_(before.tokens)
        return recording


def _first(pool: MambaState, rows: int) -> MambaState:
    """Return the first rows of the pool, in its memory."""
    return MambaState(pool.conv_state[:, :rows], pool.ssm_state[:, :rows], pool.tokens[:rows])
