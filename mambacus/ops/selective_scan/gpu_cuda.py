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

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Program, channels_last, parameter

MAX_STATES = 64
CHANNELS = 32  # of a block
_SOURCE = Path(__file__).with_name("scan.cu")
_Args = nvrtc.struct(
    "x delta B C z grad_y A D bias state seq y grad_x grad_delta grad_z grad_B grad_C end_state carry segment_steps "
    "segment_restarts chunk_states part_B part_C part_sums",
    "sxb sdb szb sgb sBb sCb",
    "sxt sdt szt sgt sBt sCt sBn sCn batches seqlen d_inner n_chunks blocks padded segment",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel is compiled and launched.

    Attributes:
        warps: warps of a block; they divide the states.
        tile: tokens between two meetings of the warps.
        blocks: blocks a multiprocessor shall hold, which bounds the registers.
        segment: tokens of one block, a multiple of the chunk length.
    """

    warps: int
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
    if any(t is not None and t.dtype not in TYPES for t in (x, *others)):
        return "they take float32, bfloat16 and float16"
    return nvrtc.unavailable() or _too_old(x.device.index)


@functools.cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"they need compute capability 8.0, got {capability[0]}.{capability[1]}"


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def forward_plan(x: Tensor, d_state: int, chunk: int) -> Plan:
    """Return the launch of ``scan_forward``."""
    return Plan(warps=4, tile=32, blocks=4, segment=_segment(x, chunk))


def backward_plan(x: Tensor, d_state: int, chunk: int) -> Plan:
    """Return the launch of ``scan_backward``."""
    return Plan(warps=4, tile=16, blocks=3, segment=_segment(x, chunk))


def _segment(x: Tensor, chunk: int) -> int:
    """Return the longest segment that leaves three blocks or more to each multiprocessor."""
    batch, seqlen, d_inner = x.shape
    rows, chunks = batch * -(-d_inner // CHANNELS), -(-seqlen // chunk)
    if rows >= _multiprocessors(x.device.index):
        return chunk * chunks
    return chunk * -(-chunks // min(chunks, -(-4 * _multiprocessors(x.device.index) // rows)))


@functools.cache
def _source() -> str:
    return nvrtc.source(_SOURCE)


def backward_shared_bytes(plan: Plan, chunk: int, d_state: int) -> int:
    """Return the bytes of shared memory of a block of ``scan_backward``: the arrays at the head of the kernel."""
    states = -(-d_state // plan.warps) * plan.warps
    floats = (chunk // plan.tile + 3) * states * CHANNELS + 3 * chunk * CHANNELS
    floats += plan.warps * 3 * plan.tile * CHANNELS + 2 * states * chunk + chunk + 2 * CHANNELS
    return 4 * floats


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
        return Inputs(
            channels_last(x), channels_last(delta), A.float().contiguous(), B, C, parameter(D),
            None if z is None else channels_last(z), parameter(delta_bias),
            None if seq_idx is None else seq_idx.to(torch.int32).contiguous(), delta_softplus,
        )  # fmt: skip

    def program(self, direction: str, plan: Plan, chunk: int, grad_y: Tensor | None = None, **flags: bool) -> Program:
        """Return the program for these inputs."""
        z = self.x if self.z is None else self.z
        macros: dict[str, int] = {
            "STATES": self.A.shape[1], "WARPS": plan.warps, "TILE": plan.tile, "CHUNK": chunk,
            "MIN_BLOCKS": plan.blocks, "X_TYPE": TYPES[self.x.dtype], "DELTA_TYPE": TYPES[self.delta.dtype],
            "B_TYPE": TYPES[self.B.dtype], "C_TYPE": TYPES[self.C.dtype], "Z_TYPE": TYPES[z.dtype],
            "VEC": nvrtc.group_size(8, self.x, self.delta, self.z, grad_y),
            "MATRIX_VEC": nvrtc.group_size(4, self.B, self.C), "HAS_D": self.D is not None,
            "HAS_Z": self.z is not None, "HAS_BIAS": self.bias is not None, "HAS_SEQ": self.seq is not None,
            "SOFTPLUS": self.softplus, "EXACT": self.x.shape[2] % CHANNELS == 0, **flags,
        }  # fmt: skip
        values = (f"{name}={int(value)}" for name, value in macros.items())
        return Program(_source(), (direction, *values), self.x.device.index)

    def arguments(self, plan: Plan, chunk: int, **more: Tensor | int | None) -> ctypes.Structure:
        """Return the struct; ``more`` are further tensors by name."""
        batch, seqlen, d_inner = self.x.shape
        n_chunks = -(-seqlen // chunk)
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | more
        del values["softplus"]
        for letter, tensor in (("x", self.x), ("d", self.delta), ("z", self.z), ("g", values.get("grad_y")),
                               ("B", self.B), ("C", self.C)):  # fmt: skip
            values[f"s{letter}b"], values[f"s{letter}t"] = nvrtc.strides(tensor)
        values |= {
            "sBn": self.B.stride(2) * self.B.element_size(), "sCn": self.C.stride(2) * self.C.element_size(),
            "batches": batch, "seqlen": seqlen, "d_inner": d_inner, "n_chunks": n_chunks,
            "blocks": -(-d_inner // CHANNELS), "padded": n_chunks * chunk, "segment": plan.segment,
        }  # fmt: skip
        arguments = _Args()
        nvrtc.fill(arguments, values)
        return arguments


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
    plan = dataclasses.replace(plan, warps=4, tile=32, blocks=1)
    program = i.program(f"SEGMENT={0 if grad_y is None else 1}", plan, chunk, grad_y,
                        HAS_STATE=state is not None, HAS_INITIAL=False, HAS_CARRY=False, SAVE=False)  # fmt: skip
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
    n_segments, blocks = -(-seqlen // plan.segment), -(-d_inner // CHANNELS)
    buffer = functools.partial(torch.empty, dtype=torch.float32, device=i.x.device)
    padded = -(-seqlen // chunk) * chunk
    part_B, part_C = buffer(blocks, batch, d_state, padded), buffer(blocks, batch, d_state, padded)
    part_sums = buffer(batch, n_segments, d_state + 2, d_inner)
    carry = None
    if plan.segment < seqlen:
        carry, grad_initial = enter_segments(i, state, grad_y, plan, chunk)
    else:
        grad_initial = buffer((batch, d_inner, d_state) if wants_initial else 0)
    program = i.program("BACKWARD", plan, chunk, grad_y, HAS_STATE=state is not None, HAS_INITIAL=wants_initial,
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
