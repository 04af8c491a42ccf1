"""The causal convolution on NVIDIA GPUs by the CUDA C++ kernels of ``conv.cu``, which NVRTC compiles at run time.

Same functions as ``gpu.py``, which chooses between these kernels and Triton's.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from mambacus.ops.nvrtc import Program, unavailable

MAX_WIDTH = 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = Path(__file__).with_name("conv.cu")
_RUN = 64  # tokens of a thread
_THREADS = 128
_POINTERS = (
    "x",
    "grad_y",
    "state",
    "grad_final",
    "weight",
    "bias",
    "seq",
    "y",
    "final_state",
    "grad_x",
    "grad_state",
    "part",
)


class _Args(ctypes.Structure):
    """``struct Args`` of ``conv.cu``, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in ("sxb", "sgb")),
        *((name, ctypes.c_int) for name in ("sxt", "sgt", "batches", "seqlen", "d_inner")),
    ]


def obstacle(x: Tensor, width: int, *others: Tensor | None) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    if x.device.type != "cuda":
        return f"they need CUDA tensors, got {x.device.type}"
    if width > MAX_WIDTH:
        return f"they hold at most {MAX_WIDTH} taps, got {width}"
    if x.shape[0] > 65535:
        return f"they take at most 65535 rows, got {x.shape[0]}"
    if any(t is not None and t.dtype not in _TYPES for t in (x, *others)):
        return "they take float32, bfloat16 and float16"
    return unavailable()


@functools.cache
def _source() -> str:
    return _SOURCE.read_text(encoding="utf-8")


def _program(
    x: Tensor, width: int, bias: Tensor | None, silu: bool, seq: Tensor | None, state: Tensor | None, *, final: bool
) -> Program:
    flags = {"HAS_BIAS": bias is not None, "HAS_SEQ": seq is not None, "HAS_STATE": state is not None,
             "HAS_FINAL": final, "SILU": silu}  # fmt: skip
    macros = [f"WIDTH={width}", f"RUN={_RUN}", f"X_TYPE={_TYPES[x.dtype]}",
              f"STATE_TYPE={_TYPES[x.dtype if state is None else state.dtype]}"]  # fmt: skip
    return Program(_source(), (*macros, *(f"{k}={int(v)}" for k, v in flags.items())), x.device.index)


def _arguments(x: Tensor, grad_y: Tensor | None, **tensors: Tensor | None) -> _Args:
    arguments = _Args()
    for name, tensor in {"x": x, "grad_y": grad_y, **tensors}.items():
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    arguments.sxb, arguments.sxt = x.stride()[:2]
    if grad_y is not None:
        arguments.sgb, arguments.sgt = grad_y.stride()[:2]
    arguments.batches, arguments.seqlen, arguments.d_inner = x.shape
    return arguments


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _parameter(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _ids(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``conv_forward``; return y and final_state."""
    batch, seqlen, d_inner = x.shape
    width = weight.shape[1]
    x, seq, state = _channels_last(x), _ids(seq_idx), None if initial_state is None else initial_state.contiguous()
    y = x.new_empty(batch, seqlen, d_inner)
    if seq is None:
        final = x.new_empty(batch, d_inner, width)
    elif state is None:
        final = x.new_zeros(batch, d_inner, width)  # a row of padding alone has no last token that would write it
    else:
        final = state.to(x.dtype, copy=True)
    weight_, bias_ = _parameter(weight), _parameter(bias)
    arguments = _arguments(x, None, weight=weight_, bias=bias_, seq=seq, state=state, y=y, final_state=final)
    program = _program(x, width, bias, silu, seq, state, final=False)
    grid = (-(-d_inner // _THREADS), -(-seqlen // _RUN), batch)
    program.kernel("conv_forward")(grid, _THREADS, arguments)
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
    x, grad_y, seq = _channels_last(x), _channels_last(grad_y.to(x.dtype)), _ids(seq_idx)
    state = None if initial_state is None else initial_state.contiguous()
    final = None if grad_final is None else grad_final.to(x.dtype).contiguous()
    runs, blocks = -(-seqlen // _RUN), -(-d_inner // _THREADS)
    grad_x = x.new_empty(batch, seqlen, d_inner)
    part = x.new_empty(batch, runs, width + 1, d_inner, dtype=torch.float32)
    grad_state = x.new_empty(0) if state is None else torch.empty_like(state)
    weight_, bias_ = _parameter(weight), _parameter(bias)
    arguments = _arguments(x, grad_y, weight=weight_, bias=bias_, seq=seq, state=state, grad_final=final,
                           grad_x=grad_x, grad_state=grad_state, part=part)  # fmt: skip
    program = _program(x, width, bias, silu, seq, state, final=final is not None)
    program.kernel("conv_backward")((blocks, runs, batch), _THREADS, arguments)
    if state is not None:
        program.kernel("conv_backward_state")((blocks, 1, batch), _THREADS, arguments)
    sums = part.sum((0, 1))
    return grad_x, sums[:width].t().contiguous(), sums[width], grad_state
