"""The causal convolution on NVIDIA GPUs by the CUDA C++ kernels of ``conv.cu``, which NVRTC compiles at run time.

Same functions as ``gpu.py``, which chooses between these kernels and Triton's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Launch, Layout, Program, channels_last

MAX_WIDTH = 16
MAX_ROWS = 65535
_SOURCE = Path(__file__).with_name("conv.cu")
_RUN = 32  # tokens of a thread, or half of it where that gives few threads
_ENOUGH_THREADS = 1 << 17
_THREADS = 128
_GROUP = 4  # channels of a thread
_RUNS = (16, 32, 64, 128)  # tokens of a thread of the backward pass, which reads WIDTH more
_Args = nvrtc.struct(
    "x grad_y grad_twin state grad_final weight bias seq y final_state grad_x grad_state part",
    "sxb sgb sob",
    "sxt sgt sot batches seqlen d_inner",
)


def obstacle(x: Tensor, width: int, *others: Tensor | None) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    if x.device.type != "cuda":
        return f"they need CUDA tensors, got {x.device.type}"
    if width > MAX_WIDTH:
        return f"they hold at most {MAX_WIDTH} taps, got {width}"
    if x.shape[0] > MAX_ROWS:
        return f"they take at most {MAX_ROWS} rows, got {x.shape[0]}"
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in TYPES:
            return f"they take float32, bfloat16 and float16, got {tensor.dtype}"
    return nvrtc.unavailable()


class Plan(NamedTuple):
    """How ``conv_backward`` is compiled and launched.

    Attributes:
        group: channels of a thread.
        blocks: blocks a multiprocessor shall hold, which bounds the registers.
        run: tokens of a thread.
    """

    group: int
    blocks: int
    run: int


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=1024)
def backward_plan(shape: tuple[int, int, int], multiprocessors: int) -> Plan:
    """Return the launch of ``conv_backward`` for x of this shape: two channels a thread, for twice as many warps.

    The tokens of a thread are chosen for whole rounds of blocks: a round that is filled in part takes as long as a full
    one. Beside its tokens a thread reads a few of its neighbour's and writes sums, about as much as 8 tokens.
    """
    batch, seqlen, d_inner = shape
    group, blocks = 2, 8

    def cost(run: int) -> tuple[int, int]:
        grid = -(-d_inner // (_THREADS * group)) * -(-seqlen // run) * batch
        return -(-grid // (blocks * multiprocessors)) * (run + 8), -run

    return Plan(group, blocks, min(_RUNS, key=cost))


class Case(NamedTuple):
    """What the code and the sizes of a launch depend on."""

    x: Layout
    grad_y: Layout | None
    grad_x: Layout | None
    width: int
    weight_type: torch.dtype
    bias_type: torch.dtype | None
    state_type: torch.dtype
    has_seq: bool
    has_state: bool
    has_final: bool
    has_twin: bool
    silu: bool
    device: int

    @staticmethod
    def of(
        x: Tensor, grad_y: Tensor | None, grad_x: Tensor | None, weight: Tensor, bias: Tensor | None, silu: bool,
        seq: Tensor | None, state: Tensor | None, final: Tensor | None, twin: Tensor | None,
    ) -> Case:  # fmt: skip
        """Return the case of these tensors."""
        return Case(
            nvrtc.layout(x), nvrtc.layout(grad_y), nvrtc.layout(grad_x), weight.shape[1], weight.dtype,
            None if bias is None else bias.dtype, x.dtype if state is None else state.dtype, seq is not None,
            state is not None, final is not None, twin is not None, silu, x.device.index,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _launch(case: Case, kernel: str, plan: Plan | None = None) -> Launch:
    """Return the launch of one kernel; ``plan`` is that of the backward pass."""
    batch, seqlen, d_inner = case.x.shape
    group = nvrtc.group_size(plan.group if plan else _GROUP, case.x, case.grad_y, case.grad_x)
    run = _RUN if batch * seqlen * d_inner >= _ENOUGH_THREADS * group * _RUN else _RUN // 2
    run = plan.run if plan else run
    macros = nvrtc.macros(
        WIDTH=case.width, RUN=run, VEC=group, THREADS=_THREADS, MIN_BLOCKS=plan.blocks if plan else 1,
        X_TYPE=TYPES[case.x.dtype], STATE_TYPE=TYPES[case.state_type], WEIGHT_TYPE=TYPES[case.weight_type],
        BIAS_TYPE=TYPES[case.bias_type or case.weight_type], HAS_BIAS=case.bias_type is not None,
        HAS_SEQ=case.has_seq, HAS_STATE=case.has_state, HAS_FINAL=case.has_final, HAS_TWIN=case.has_twin,
        SILU=case.silu,
    )  # fmt: skip
    numbers = {"batches": batch, "seqlen": seqlen, "d_inner": d_inner}
    numbers["sxb"], numbers["sxt"] = case.x.strides
    if case.grad_y is not None and case.grad_x is not None:
        numbers["sgb"], numbers["sgt"] = case.grad_y.strides
        numbers["sob"], numbers["sot"] = case.grad_x.strides
    if kernel == "conv_backward_state":
        grid = (-(-d_inner // _THREADS), 1, batch)
    else:
        grid = (-(-d_inner // (_THREADS * group)), -(-seqlen // run), batch)
    program = Program(nvrtc.source(_SOURCE), macros, case.device)
    return Launch.of(program, kernel, grid, _THREADS, _Args, numbers)


def _parameter(tensor: Tensor) -> Tensor:
    """Return the taps or the bias as the kernels read them: in their own dtype, since a conversion is a launch."""
    return (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()


def _ids(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``conv_forward``; return y and final_state."""
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, seq, state = channels_last(x), _ids(seq_idx), None if initial_state is None else initial_state.contiguous()
    weight, bias = _parameter(weight), None if bias is None else _parameter(bias)
    y = x.new_empty(batch, seqlen, d_inner)
    if seq is None:
        final = x.new_empty(batch, d_inner, width)
    elif state is None:
        final = x.new_zeros(batch, d_inner, width)  # a row of padding alone has no last token that would write it
    else:
        final = state.to(x.dtype, copy=True)
    launch = _launch(Case.of(x, None, None, weight, bias, silu, seq, state, None, None), "conv_forward")
    launch(x=x, weight=weight, bias=bias, seq=seq, state=state, y=y, final_state=final)
    return y, final


def backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    grad_x: Tensor | None = None,
    grad_twin: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels; return gradients of x, weight, bias (float32) and initial_state.

    ``grad_x`` is memory for that gradient, rows with neighbouring channels next to each other; fresh if None.
    ``grad_twin`` is added to ``grad_y``: by the kernel where both lie in memory alike.
    """
    if grad_twin is not None and (initial_state is not None or nvrtc.layout(grad_twin) != nvrtc.layout(grad_y)):
        grad_y, grad_twin = grad_y + grad_twin, None
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, grad_y, seq = channels_last(x), channels_last(grad_y.to(x.dtype)), _ids(seq_idx)
    twin = None if grad_twin is None else channels_last(grad_twin.to(x.dtype))
    state = None if initial_state is None else initial_state.contiguous()
    weight, bias = _parameter(weight), None if bias is None else _parameter(bias)
    final = None if grad_final is None else grad_final.to(x.dtype).contiguous()
    grad_x = x.new_empty(batch, seqlen, d_inner) if grad_x is None else grad_x
    case = Case.of(x, grad_y, grad_x, weight, bias, silu, seq, state, final, twin)
    plan = plan or backward_plan(x.shape, _multiprocessors(x.device.index))
    launch = _launch(case, "conv_backward", plan)
    part = x.new_empty(batch, launch.grid[1], width + 1, d_inner, dtype=torch.float32)
    grad_state = x.new_empty(0) if state is None else torch.empty_like(state)
    tensors = {"x": x, "grad_y": grad_y, "grad_twin": twin, "weight": weight, "bias": bias,
               "seq": seq, "state": state, "grad_final": final, "grad_x": grad_x, "grad_state": grad_state,
               "part": part}  # fmt: skip
    launch(**tensors)
    if state is not None:
        _launch(case, "conv_backward_state", plan)(**tensors)
    sums = part.sum((0, 1))
    return grad_x, sums[:width].t().contiguous(), sums[width], grad_state
