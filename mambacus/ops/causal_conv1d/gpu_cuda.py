"""The causal convolution on NVIDIA GPUs by the CUDA C++ kernels of ``conv.cu``, which NVRTC compiles at run time.

Same functions as ``gpu.py``, which chooses between these kernels and Triton's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Program, channels_last, parameter

MAX_WIDTH = 16
_SOURCE = Path(__file__).with_name("conv.cu")
_RUN = 64  # tokens of a thread, or a quarter of it where that gives few threads
_ENOUGH_THREADS = 1 << 17
_THREADS = 128
_GROUP = 4  # channels of a thread
_Args = nvrtc.struct(
    "x grad_y state grad_final weight bias seq y final_state grad_x grad_state part",
    "sxb sgb",
    "sxt sgt batches seqlen d_inner",
)


def obstacle(x: Tensor, width: int, *others: Tensor | None) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    if x.device.type != "cuda":
        return f"they need CUDA tensors, got {x.device.type}"
    if width > MAX_WIDTH:
        return f"they hold at most {MAX_WIDTH} taps, got {width}"
    if x.shape[0] > 65535:
        return f"they take at most 65535 rows, got {x.shape[0]}"
    if any(t is not None and t.dtype not in TYPES for t in (x, *others)):
        return "they take float32, bfloat16 and float16"
    return nvrtc.unavailable()


@functools.cache
def _source() -> str:
    return nvrtc.source(_SOURCE)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How a kernel is compiled and launched: channels and tokens of a thread, and the grid."""

    group: int
    run: int
    grid: tuple[int, int, int]

    @staticmethod
    def of(x: Tensor, grad_y: Tensor | None = None) -> _Launch:
        batch, seqlen, d_inner = x.shape
        group = nvrtc.group_size(_GROUP, x, grad_y)
        run = _RUN if batch * seqlen * d_inner >= _ENOUGH_THREADS * group * _RUN else _RUN // 4
        return _Launch(group, run, (-(-d_inner // (_THREADS * group)), -(-seqlen // run), batch))

    def program(
        self, x: Tensor, width: int, bias: Tensor | None, silu: bool, seq: Tensor | None, state: Tensor | None, *,
        final: bool,
    ) -> Program:  # fmt: skip
        """Return the program for these inputs."""
        macros = {
            "WIDTH": width, "RUN": self.run, "VEC": self.group, "X_TYPE": TYPES[x.dtype],
            "STATE_TYPE": TYPES[x.dtype if state is None else state.dtype], "HAS_BIAS": bias is not None,
            "HAS_SEQ": seq is not None, "HAS_STATE": state is not None, "HAS_FINAL": final, "SILU": silu,
        }  # fmt: skip
        return Program(_source(), tuple(f"{name}={int(value)}" for name, value in macros.items()), x.device.index)


def _arguments(x: Tensor, grad_y: Tensor | None, **tensors: Tensor | None) -> ctypes.Structure:
    arguments = _Args()
    sxb, sxt = nvrtc.strides(x)
    sgb, sgt = nvrtc.strides(grad_y)
    batch, seqlen, d_inner = x.shape
    sizes = {"sxb": sxb, "sxt": sxt, "sgb": sgb, "sgt": sgt, "batches": batch, "seqlen": seqlen, "d_inner": d_inner}
    nvrtc.fill(arguments, {"x": x, "grad_y": grad_y, **tensors, **sizes})
    return arguments


def _ids(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``conv_forward``; return y and final_state."""
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, seq, state = channels_last(x), _ids(seq_idx), None if initial_state is None else initial_state.contiguous()
    y = x.new_empty(batch, seqlen, d_inner)
    if seq is None:
        final = x.new_empty(batch, d_inner, width)
    elif state is None:
        final = x.new_zeros(batch, d_inner, width)  # a row of padding alone has no last token that would write it
    else:
        final = state.to(x.dtype, copy=True)
    weight_, bias_ = parameter(weight), parameter(bias)
    arguments = _arguments(x, None, weight=weight_, bias=bias_, seq=seq, state=state, y=y, final_state=final)
    launch = _Launch.of(x)
    program = launch.program(x, width, bias, silu, seq, state, final=False)
    program.kernel("conv_forward")(launch.grid, _THREADS, arguments)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels; return gradients of x, weight, bias (float32) and initial_state."""
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, grad_y, seq = channels_last(x), channels_last(grad_y.to(x.dtype)), _ids(seq_idx)
    state = None if initial_state is None else initial_state.contiguous()
    final = None if grad_final is None else grad_final.to(x.dtype).contiguous()
    launch = _Launch.of(x, grad_y)
    grad_x = x.new_empty(batch, seqlen, d_inner)
    part = x.new_empty(batch, launch.grid[1], width + 1, d_inner, dtype=torch.float32)
    grad_state = x.new_empty(0) if state is None else torch.empty_like(state)
    weight_, bias_ = parameter(weight), parameter(bias)
    arguments = _arguments(x, grad_y, weight=weight_, bias=bias_, seq=seq, state=state, grad_final=final,
                           grad_x=grad_x, grad_state=grad_state, part=part)  # fmt: skip
    program = launch.program(x, width, bias, silu, seq, state, final=final is not None)
    program.kernel("conv_backward")(launch.grid, _THREADS, arguments)
    if state is not None:
        program.kernel("conv_backward_state")((-(-d_inner // _THREADS), 1, batch), _THREADS, arguments)
    sums = part.sum((0, 1))
    return grad_x, sums[:width].t().contiguous(), sums[width], grad_state
