"""The selective scan on NVIDIA GPUs by the CUDA C++ kernels of ``scan.cu``, which NVRTC compiles at run time.

Same functions as ``gpu.py``, which chooses between these kernels and Triton's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.nvrtc import Program, unavailable

MAX_STATES = 64
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = Path(__file__).with_name("scan.cu")
_SHARED_BYTES = 232448 - 1024  # of a block on sm_90, less what the driver keeps
_POINTERS = (
    "x",
    "delta",
    "B",
    "C",
    "z",
    "grad_y",
    "A",
    "D",
    "bias",
    "state",
    "seq",
    "y",
    "grad_x",
    "grad_delta",
    "grad_z",
    "grad_B",
    "grad_C",
    "end_state",
    "carry",
    "segment_steps",
    "segment_restarts",
    "chunk_states",
    "part_B",
    "part_C",
    "part_sums",
)
_STRIDES = ("sxb", "sdb", "szb", "sgb", "sBb", "sCb")
_INTEGERS = (
    "sxt",
    "sdt",
    "szt",
    "sgt",
    "sBt",
    "sCt",
    "sBn",
    "sCn",
    "batches",
    "seqlen",
    "d_inner",
    "n_chunks",
    "blocks",
    "padded",
    "segment",
)


class _Args(ctypes.Structure):
    """``struct Args`` of ``scan.cu``, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        *((name, ctypes.c_int) for name in _INTEGERS),
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel is compiled and launched.

    Attributes:
        warps: warps of a block; they divide the states.
        cpt: channels of one thread, so a block has 32 x cpt.
        tile: tokens between two meetings of the warps.
        blocks: blocks a multiprocessor shall hold, which bounds the registers.
        segment: tokens of one block, a multiple of the chunk length.
    """

    warps: int
    cpt: int
    tile: int
    blocks: int
    segment: int


def obstacle(x: Tensor, d_state: int, *others: Tensor | None) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    if x.device.type != "cuda":
        return f"they need CUDA tensors, got {x.device.type}"
    if d_state > MAX_STATES:
        return f"they hold at most {MAX_STATES} states, got {d_state}"
    if x.shape[0] > 65535:
        return f"they take at most 65535 rows, got {x.shape[0]}"
    if any(t is not None and t.dtype not in _TYPES for t in (x, *others)):
        return "they take float32, bfloat16 and float16"
    return unavailable() or _too_old(x.device.index)


@functools.cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"they need compute capability 8.0, got {capability[0]}.{capability[1]}"


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def forward_plan(x: Tensor, d_state: int, chunk: int) -> Plan:
    """Return the launch of ``scan_forward``."""
    return Plan(warps=4, cpt=1, tile=32, blocks=1, segment=_segment(x, 32, chunk))


def backward_plan(x: Tensor, d_state: int, chunk: int) -> Plan:
    """Return the launch of ``scan_backward``."""
    return Plan(warps=4, cpt=1, tile=16, blocks=1, segment=_segment(x, 32, chunk))


def _segment(x: Tensor, channels: int, chunk: int) -> int:
    """Return the longest segment that leaves two blocks or more to each multiprocessor."""
    batch, seqlen, d_inner = x.shape
    rows, chunks = batch * -(-d_inner // channels), -(-seqlen // chunk)
    if rows >= _multiprocessors(x.device.index):
        return chunk * chunks
    return chunk * -(-chunks // min(chunks, -(-4 * _multiprocessors(x.device.index) // rows)))


@functools.cache
def _source() -> str:
    return _SOURCE.read_text(encoding="utf-8")


def _program(direction: str, plan: Plan, chunk: int, d_state: int, dtypes: dict[str, torch.dtype], device: int,
             **flags: bool) -> Program:  # fmt: skip
    macros = [direction, f"STATES={d_state}", f"WARPS={plan.warps}", f"CPT={plan.cpt}", f"TILE={plan.tile}",
              f"CHUNK={chunk}", f"MIN_BLOCKS={plan.blocks}"]  # fmt: skip
    macros += [f"{name}_TYPE={_TYPES[dtype]}" for name, dtype in dtypes.items()]
    macros += [f"{name}={int(value)}" for name, value in flags.items()]
    return Program(_source(), tuple(macros), device)


def backward_shared_bytes(plan: Plan, chunk: int, d_state: int) -> int:
    """Return the bytes of shared memory of a block of ``scan_backward``: the arrays at the head of the kernel."""
    channels = 32 * plan.cpt
    states = -(-d_state // plan.warps) * plan.warps
    floats = (chunk // plan.tile + 3) * states * channels + 3 * chunk * channels
    floats += plan.warps * 3 * plan.tile * channels + 2 * states * chunk + chunk
    return 4 * floats


def _row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Return the batch stride in elements and the token stride in bytes."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1) * tensor.element_size())


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs as the kernels want them: channels next to each other, parameters float32 and contiguous."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    seq: Tensor | None
    softplus: bool

    @staticmethod
    def of(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool, seq_idx: Tensor | None,
    ) -> Inputs:  # fmt: skip
        """Copy what is not yet as wanted."""

        def parameter(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.float().contiguous()

        return Inputs(
            channels_last(x), channels_last(delta), A.float().contiguous(), B, C, parameter(D),
            None if z is None else channels_last(z), parameter(delta_bias),
            None if seq_idx is None else seq_idx.to(torch.int32).contiguous(), delta_softplus,
        )  # fmt: skip

    def program(self, direction: str, plan: Plan, chunk: int, **flags: bool) -> Program:
        """Return the program for these inputs."""
        dtypes = {"X": self.x.dtype, "DELTA": self.delta.dtype, "B": self.B.dtype, "C": self.C.dtype,
                  "Z": self.x.dtype if self.z is None else self.z.dtype}  # fmt: skip
        return _program(
            direction, plan, chunk, self.A.shape[1], dtypes, self.x.device.index, HAS_D=self.D is not None,
            HAS_Z=self.z is not None, HAS_BIAS=self.bias is not None, HAS_SEQ=self.seq is not None,
            SOFTPLUS=self.softplus, EXACT=self.x.shape[2] % (32 * plan.cpt) == 0, **flags,
        )  # fmt: skip

    def arguments(self, plan: Plan, chunk: int, **more: Any) -> _Args:
        """Return the struct; ``more`` are further tensors and integers by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "softplus"} | more
        arguments = _Args()
        for name in _POINTERS:
            tensor = values.pop(name, None)
            if tensor is not None:
                setattr(arguments, name, tensor.data_ptr())
        for letter, tensor in (("x", self.x), ("d", self.delta), ("z", self.z), ("g", more.get("grad_y")),
                               ("B", self.B), ("C", self.C)):  # fmt: skip
            batch_stride, token_stride = _row_strides(tensor)
            setattr(arguments, f"s{letter}b", batch_stride)
            setattr(arguments, f"s{letter}t", token_stride)
        arguments.sBn = self.B.stride(2) * self.B.element_size()
        arguments.sCn = self.C.stride(2) * self.C.element_size()
        batch, seqlen, d_inner = self.x.shape
        arguments.batches, arguments.seqlen, arguments.d_inner = batch, seqlen, d_inner
        arguments.n_chunks, arguments.blocks = -(-seqlen // chunk), -(-d_inner // (32 * plan.cpt))
        arguments.padded, arguments.segment = -(-seqlen // chunk) * chunk, plan.segment
        return arguments


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels next to each other, copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def enter_segments(
    i: Inputs, state: Tensor | None, grad_y: Tensor | None, plan: Plan, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return what enters each segment, (batch, segment, n, d), and what leaves the row, (batch, d, n).

    Args:
        i: the inputs.
        state: what enters the row, or None for zeros: the initial state, or with ``grad_y`` the final state's gradient.
        grad_y: None for the states, forwards; the gradient of y for the adjoints, backwards.
        plan: the launch of the scan whose segments these are.
        chunk: chunk length.
    """
    batch, seqlen, d_inner = i.x.shape
    d_state = i.A.shape[1]
    n_segments = -(-seqlen // plan.segment)
    buffer = functools.partial(torch.empty, dtype=torch.float32, device=i.x.device)
    carry, leaving = buffer(batch, n_segments, d_state, d_inner), buffer(batch, d_inner, d_state)
    steps, restarts = buffer(batch, n_segments, d_inner), buffer(batch, n_segments)
    plan = dataclasses.replace(plan, warps=4, cpt=1, tile=32, blocks=1)
    program = i.program(f"SEGMENT={0 if grad_y is None else 1}", plan, chunk, HAS_STATE=state is not None,
                        HAS_INITIAL=False, HAS_CARRY=False, SAVE=False)  # fmt: skip
    arguments = i.arguments(
        plan, chunk, state=state, grad_y=grad_y, carry=carry, end_state=leaving, segment_steps=steps,
        segment_restarts=restarts,
    )  # fmt: skip
    program.kernel("scan_segment")((batch * arguments.blocks, n_segments, 1), 32 * plan.warps, arguments)
    program.kernel("chain_segments")((-(-d_inner // 128), d_state, batch), 128, arguments)
    return carry, leaving


def forward(
    i: Inputs, initial_state: Tensor | None, save_states: bool, plan: Plan, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels; return y, final_state and the states at the chunks, (batch, chunk, n, d) in memory."""
    batch, seqlen, d_inner = i.x.shape
    d_state = i.A.shape[1]
    y = i.x.new_empty(batch, seqlen, d_inner)
    chunks = i.x.new_empty(batch, -(-seqlen // chunk) if save_states else 0, d_inner, d_state, dtype=torch.float32)
    state = None if initial_state is None else initial_state.float().contiguous()
    carry = None
    if plan.segment < seqlen:
        carry, final = enter_segments(i, state, None, plan, chunk)
    else:
        final = i.x.new_empty(batch, d_inner, d_state, dtype=torch.float32)
    program = i.program("FORWARD", plan, chunk, HAS_STATE=state is not None, HAS_INITIAL=False,
                        HAS_CARRY=carry is not None, SAVE=save_states)  # fmt: skip
    arguments = i.arguments(plan, chunk, state=state, y=y, end_state=final, carry=carry, chunk_states=chunks)
    grid = (batch * arguments.blocks, -(-seqlen // plan.segment), 1)
    program.kernel("scan_forward")(grid, 32 * plan.warps, arguments)
    return y, final, chunks


def backward(
    i: Inputs, grad_y: Tensor, grad_final: Tensor | None, chunk_states: Tensor, plan: Plan, chunk: int, *,
    wants_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernels and the sums over blocks, segments and rows of the batch.

    Returns:
        Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; those of A, D, delta_bias and initial_state in
        float32, what is not wanted empty.
    """
    batch, seqlen, d_inner = i.x.shape
    d_state = i.A.shape[1]
    grad_y = channels_last(grad_y.to(i.x.dtype))
    state = None if grad_final is None else grad_final.float().contiguous()
    shared = backward_shared_bytes(plan, chunk, d_state)
    n_segments, blocks = -(-seqlen // plan.segment), -(-d_inner // (32 * plan.cpt))
    buffer = functools.partial(torch.empty, dtype=torch.float32, device=i.x.device)
    padded = -(-seqlen // chunk) * chunk
    part_B, part_C = buffer(blocks, batch, d_state, padded), buffer(blocks, batch, d_state, padded)
    part_sums = buffer(batch, n_segments, d_state + 2, d_inner)
    carry = None
    if plan.segment < seqlen:
        carry, grad_initial = enter_segments(i, state, grad_y, plan, chunk)
    else:
        grad_initial = buffer((batch, d_inner, d_state) if wants_initial else 0)
    program = i.program("BACKWARD", plan, chunk, HAS_STATE=state is not None, HAS_INITIAL=wants_initial,
                        HAS_CARRY=carry is not None, SAVE=False)  # fmt: skip
    grad_x, grad_delta = i.x.new_empty(i.x.shape), i.delta.new_empty(i.x.shape)
    grad_z = i.x.new_empty(0) if i.z is None else i.z.new_empty(i.x.shape)
    grad_B, grad_C = i.B.new_empty(i.B.shape), i.C.new_empty(i.C.shape)
    arguments = i.arguments(
        plan, chunk, grad_y=grad_y, state=state, carry=carry, chunk_states=chunk_states, grad_x=grad_x,
        grad_delta=grad_delta, grad_z=grad_z, grad_B=grad_B, grad_C=grad_C, end_state=grad_initial, part_B=part_B,
        part_C=part_C, part_sums=part_sums,
    )  # fmt: skip
    program.kernel("scan_backward", shared)((batch * blocks, n_segments, 1), 32 * plan.warps, arguments)
    program.kernel("sum_tokens")((-(-seqlen // 32), batch, 2), 256, arguments)
    sums = part_sums.sum((0, 1))
    return (grad_x, grad_delta, sums[:d_state].t().contiguous(), grad_B, grad_C, sums[d_state], grad_z,
            sums[d_state + 1], grad_initial)  # fmt: skip
