"""Forward passes over prompts; on a GPU, passes of a shape that comes again are repeated from CUDA graphs."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mambacus.inference.decoder import BUCKETS
from mambacus.inference.watch import Watch
from mambacus.models import MambaLM, MambaState
from mambacus.runtime.graphs import CudaRecorder, Recorder

_log = logging.getLogger(__name__)

# Tokens of a row of a recorded pass. Up to 256 the GPU mostly waits for weights, so padding costs it nothing; beyond,
# at most a quarter is padding.
LENGTHS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
           3584, 4096, 5120, 6144, 7168, 8192)  # fmt: skip
MOST_TOKENS = 8192  # of all rows together
MOST_NUMBERS = 1 << 35  # tokens x d_model x d_inner: beyond, a layer's kernels take longer than their launches
MOST_STATE_BYTES = 1 << 30  # of the states of all rows, and a 64th of a GPU's memory; recordings hold twice as much
MOST_RECORDINGS = 16
IDLE_PASSES = 64  # after so many passes without it a recording may make room; one in so many passes does


class Read(NamedTuple):
    """What a pass gives: logits after each row's last token, float32 (rows, 1, vocabulary), and the states there."""

    logits: Tensor
    state: MambaState


class Shape(NamedTuple):
    """What a recording is made for.

    Attributes:
        rows: of the batch, padding among them.
        tokens: of each row, padding among them.
        padded: there may be padding, so that ``seq_idx`` is needed.
    """

    rows: int
    tokens: int
    padded: bool


@dataclasses.dataclass
class _Recording:
    inputs: dict[str, Tensor]
    state: MambaState  # before the pass, and after it
    replay: Callable[[], None]
    logits: Tensor
    used: int = 0  # number of the pass that used it last


class PromptPasses:
    """Reads rows of tokens, each to its end, from the beginning of a document or from states.

    A layer is about ten launches, which take the CPU longer than the GPU as long as there are few tokens. On a GPU, if
    the model is plain (`Watch`: no adapter, no hooks), the second pass of a `Shape` is recorded as a CUDA graph and all
    later ones are repeated from it: lengths are filled up to `LENGTHS` and rows to `BUCKETS`, so that few shapes are
    met. Padding needs ``seq_idx``, with which the kernels look up each token's document; rows of one length that need
    no filling up have graphs of their own without it. Passes of many tokens run as they are, unpadded, since the GPU is
    what they wait for; so do those of other models, and scored prompts, which do not come here.

    The first pass of a shape is filled up too: the numbers do not depend on whether a pass is repeated. Beside passes
    without graphs they differ by rounding in matrix products of other sizes.

    Memory:
        All graphs share what a pass needs; of the largest shape that is its activations (1.4b: 0.2 GB for 4096 tokens)
        and its states twice (1.4b: 28 MB a row), as inputs and on their way. Each graph has its logits for itself.
        What is returned is a copy. `MOST_STATE_BYTES` bounds the rows and `MOST_RECORDINGS` the graphs. When all are
        taken, the least recently used leaves for another shape, but only after `IDLE_PASSES`: recording takes as long
        as several passes, so shapes that take turns are not recorded anew each time.

    Args:
        model: what reads: a `MambaLM` or a model around it.
        base: the `MambaLM` in it.
        graphs: repeat passes from recordings where the model and its device allow it.
        recorder: makes the recordings; None for CUDA graphs on a GPU.

    Attributes:
        counts: passes that were ``repeated`` and that ran as they are (``direct``), and ``recorded`` graphs.
    """

    def __init__(
        self, model: nn.Module, base: MambaLM, *, graphs: bool = True, recorder: Recorder | None = None
    ) -> None:
        self._model, self._base = model, base
        self._wanted = graphs and model is base
        self._given_recorder = recorder
        self._recorder = recorder
        self._watch: Watch | None = None
        self._recordings: dict[Shape, _Recording] = {}
        self._met: set[Shape] = set()
        self._memory: MambaState | None = None  # of the most rows so far; a smaller one lives with its recordings
        self._recorded_last = 0  # number of the pass
        self.counts = {"recorded": 0, "repeated": 0, "direct": 0}

    def run(self, parts: Sequence[Sequence[int]], state: MambaState | None) -> Read:
        """Read a row of tokens each, at least one, from the beginning or from the rows of ``state``."""
        shape = self._shape(parts) if self._may_record() else None
        recording = None if shape is None else self._recording(shape)
        if recording is None:
            self.counts["direct"] += 1
            return self._read(parts, state) if shape is None else self._read_filled(shape, parts, state)
        assert shape is not None
        for name, tensor in _filled(shape, parts).items():
            recording.inputs[name].copy_(tensor, non_blocking=True)
        _begin(recording.state, state)
        recording.replay()
        self.counts["repeated"] += 1
        recording.used = self._passes
        after = recording.state.narrow(0, len(parts))
        return Read(
            recording.logits[: len(parts)].clone(),
            MambaState(after.conv_state.clone(), after.ssm_state.clone(), after.tokens.clone()),
        )

    def _read(self, parts: Sequence[Sequence[int]], state: MambaState | None) -> Read:
        """Do a pass as it is."""
        out = self._model(**padded(parts, self._base.device), state=state)
        return Read(out.logits, out.state)

    def _read_filled(self, shape: Shape, parts: Sequence[Sequence[int]], state: MambaState | None) -> Read:
        """Do a pass as its recording will, so that the numbers do not change when there is one."""
        inputs = {name: tensor.to(self._base.device) for name, tensor in _filled(shape, parts).items()}
        memory = MambaState.zeros(self._base.config, shape.rows, self._base.device, self._base.dtype)
        _begin(memory, state)
        out = self._base(**inputs, state=memory, reuse_state=True)
        return Read(out.logits[: len(parts)], out.state.narrow(0, len(parts)))

    @property
    def _passes(self) -> int:
        return self.counts["repeated"] + self.counts["direct"]

    def _may_record(self) -> bool:
        """Tell whether passes may be recorded now; if the model changed, forget what was recorded."""
        device = self._base.device.type
        if not self._wanted or not (device == "cuda" or self._given_recorder):
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            return False
        if self._watch is None or not self._watch.unchanged():
            self._watch, self._memory = Watch(self._base), None
            self._recordings.clear()
            self._met.clear()
            self._recorder = self._given_recorder or CudaRecorder(self._base.device)
        return self._watch.plain

    def _shape(self, parts: Sequence[Sequence[int]]) -> Shape | None:
        """Return the shape that ``parts`` are filled up to, None if such a pass is not recorded."""
        config = self._base.config
        longest, shortest = max(map(len, parts)), min(map(len, parts))
        if len(parts) > BUCKETS[-1] or longest > LENGTHS[-1]:
            return None
        rows, tokens = BUCKETS[bisect.bisect_left(BUCKETS, len(parts))], LENGTHS[bisect.bisect_left(LENGTHS, longest)]
        numbers = rows * tokens * config.d_model * config.d_inner
        one = MambaState.zeros(config, 1, "meta", self._base.dtype)
        state_bytes = rows * (one.conv_state.nbytes + one.ssm_state.nbytes)
        if rows * tokens > MOST_TOKENS or numbers > MOST_NUMBERS or state_bytes > self._most_state_bytes():
            return None
        return Shape(rows, tokens, padded=(len(parts), shortest) != (rows, tokens))

    def _most_state_bytes(self) -> int:
        device = self._base.device
        if device.type != "cuda":
            return MOST_STATE_BYTES
        return min(MOST_STATE_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)

    def _recording(self, shape: Shape) -> _Recording | None:
        """Return the recording of a shape, made now if it was met before and there is room."""
        recording = self._recordings.get(shape)
        if recording is not None:
            return recording
        if shape not in self._met:
            self._met.add(shape)
            return None
        if len(self._recordings) >= MOST_RECORDINGS:
            oldest = min(self._recordings, key=lambda known: self._recordings[known].used)
            if self._passes - max(self._recorded_last, self._recordings[oldest].used) < IDLE_PASSES:
                return None
            del self._recordings[oldest]
        made = self._recordings[shape] = self._record(shape)
        self._recorded_last = self._passes
        return made

    def _record(self, shape: Shape) -> _Recording:
        _log.info("recording the reading of %d rows of %d tokens", shape.rows, shape.tokens)
        assert self._recorder is not None
        with torch.inference_mode(False):  # else nothing outside that mode could write into the memory
            state = self._states(shape.rows)
            inputs = {
                name: tensor.to(self._base.device)
                for name, tensor in _filled(shape, [[0] * shape.tokens] * shape.rows).items()
            }

        def read() -> Tensor:
            out = self._base(**inputs, state=state, reuse_state=True)
            state.tokens.copy_(out.state.tokens)
            logits: Tensor = out.logits
            return logits

        self._recorder.warm_up(read)
        replay, logits = self._recorder.record(read)
        self.counts["recorded"] += 1
        return _Recording(inputs, state, replay, logits)

    def _states(self, rows: int) -> MambaState:
        """Return memory for the states of so many rows, which recordings share."""
        if self._memory is None or self._memory.batch < rows:
            self._memory = MambaState.zeros(self._base.config, rows, self._base.device, self._base.dtype)
        memory = self._memory
        return MambaState(_beginning(memory.conv_state, rows), _beginning(memory.ssm_state, rows), memory.tokens[:rows])


def _begin(memory: MambaState, state: MambaState | None) -> None:
    """Write into the first rows of ``memory`` what a pass begins from, None for beginnings of documents."""
    if state is None:
        for tensor in (memory.conv_state, memory.ssm_state, memory.tokens):
            tensor.zero_()
        return
    memory.conv_state[:, : state.batch].copy_(state.conv_state)
    memory.ssm_state[:, : state.batch].copy_(state.ssm_state)
    memory.tokens[: state.batch].copy_(state.tokens)


def _beginning(memory: Tensor, rows: int) -> Tensor:
    """Return the beginning of ``memory`` (layers, more rows, ...) as states of so many rows, without gaps."""
    shape = (len(memory), rows, *memory.shape[2:])
    return memory.flatten()[: math.prod(shape)].view(shape)


def _filled(shape: Shape, parts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the inputs of a pass of ``shape``, on the CPU; rows beyond ``parts`` are padding alone."""
    filled = [*parts, *[()] * (shape.rows - len(parts))]
    inputs = padded(filled, torch.device("cpu"), shape.tokens, ragged=shape.padded)
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def padded(
    parts: Sequence[Sequence[int]], device: torch.device, width: int = 0, *, ragged: bool = False
) -> dict[str, Tensor | None]:
    """Return a model's inputs for rows of tokens padded on the right, and the position of each row's last token.

    Args:
        parts: the rows; one without tokens is padding alone.
        device: of the inputs.
        width: tokens of a row with padding; 0 for the longest row's.
        ragged: say which tokens are padding even where none is.
    """
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    width = width or int(lengths.max())
    ids = np.zeros((len(parts), width), np.int64)
    for row, part in zip(ids, parts, strict=True):
        row[: len(part)] = part
    inputs = {"input_ids": ids, "logits_at": np.maximum(lengths - 1, 0)[:, None]}
    if ragged or lengths.min() < width:
        inputs["seq_idx"] = -(np.arange(width) >= lengths[:, None]).astype(np.int32)
    return {"seq_idx": None} | {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
