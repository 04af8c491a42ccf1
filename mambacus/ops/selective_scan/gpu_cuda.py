"""The selective scan on NVIDIA GPUs by the CUDA C++ kernels of ``scan_*.cu``, which NVRTC compiles at run time.

Same functions as ``gpu.py``, which chooses between these kernels and Triton's.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import TYPES, Launch, Layout, Program, channels_last, layout, near, parameter

MAX_STATES = 64
MAX_ROWS = 65535
CHANNELS = 32  # of a block
SUM_TOKENS = 128  # of a block of ``sum_tokens``
# Blocks for each multiprocessor with which a sequence is left whole, since cut, its exponentials are computed again. A
# cut one gives at least so many blocks, of at most so many tokens and at least so many chunks. Measured on an H100.
_ENOUGH_FORWARD, _ENOUGH_BACKWARD = 0.65, 1.45
_PLENTY = 3.5  # blocks for each multiprocessor from which fewer and longer warps are faster
_SEGMENTED_BLOCKS, _LONGEST_SEGMENT, _FEWEST_CHUNKS = 4, 1024, 3
MOST_SETS = 2  # of channels a block
_RESERVED_BYTES = 1024  # of shared memory that the driver takes for a block
_SOURCE = Path(__file__).with_name("scan.cuh")
_BODIES = {"BACKWARD": "scan_backward.cu"}  # by direction, else scan_forward.cu
_Args = nvrtc.struct(
    "x delta B C z grad_y A D bias state seq y grad_x grad_delta grad_z grad_B grad_C end_state carry segment_steps "
    "segment_restarts chunk_states part_B part_C part_sums grad_A grad_D grad_bias",
    "sxb sdb szb sgb sBb sCb sob",
    "sxt sdt szt sgt sBt sCt sBn sCn sot batches seqlen d_inner n_chunks blocks padded segment",
)


def chunk_length(d_state: int) -> int:
    """Return the number of tokens between two saved states, for Triton too: 64, or more for more than 64 states."""
    return max(64, 1 << (d_state - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel is compiled and launched.

    Attributes:
        warps: warps of a block; they divide the states.
        tile: tokens between two meetings of the warps.
        blocks: blocks a multiprocessor shall hold, which bounds the registers.
        segment: tokens of one block, a multiple of the chunk length.
        sets: of ``CHANNELS`` channels that a block of the backward pass takes one after the other in each chunk; it
            adds up their parts of the gradients of B and C itself.
    """

    warps: int
    tile: int
    blocks: int
    segment: int
    sets: int = 1


def obstacle(x: Tensor, d_state: int, *others: Tensor | None) -> str | None:
    """Return why these kernels cannot take the inputs, or None if they can."""
    if x.device.type != "cuda":
        return f"they need CUDA tensors, got {x.device.type}"
    if d_state > MAX_STATES:
        return f"they hold at most {MAX_STATES} states, got {d_state}"
    if x.shape[0] > MAX_ROWS:
        return f"they take at most {MAX_ROWS} rows, got {x.shape[0]}"
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in TYPES:
            return f"they take float32, bfloat16 and float16, got {tensor.dtype}"
    return nvrtc.unavailable() or _too_old(x.device.index)


@functools.cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"they need compute capability 8.0, got {capability[0]}.{capability[1]}"


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _shared_bytes(device: int) -> int:
    """Return the shared memory of a multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.lru_cache(maxsize=1024)
def forward_plan(shape: tuple[int, int, int], d_state: int, chunk: int, device: int) -> Plan:
    """Return the launch of ``scan_forward`` for x of this shape."""
    batch, seqlen, d_inner = shape
    segment = _segment(shape, chunk, device, _ENOUGH_FORWARD)
    blocks = batch * -(-d_inner // CHANNELS) * -(-seqlen // segment)
    if d_state > 16:
        return Plan(warps=4, tile=32, blocks=1, segment=segment)
    if blocks >= _PLENTY * _multiprocessors(device):
        return Plan(warps=2, tile=32, blocks=6, segment=segment)  # less work for each state, fewer warps in flight
    return Plan(warps=4, tile=32, blocks=4, segment=segment)


@functools.lru_cache(maxsize=1024)
def backward_plan(
    shape: tuple[int, int, int], d_state: int, chunk: int, device: int, reads_y: bool, most_sets: int = MOST_SETS
) -> Plan:
    """Return the launch of ``scan_backward`` for x of this shape.

    Where it is given y, a block takes two sets of channels if ``most_sets`` allows it, if that leaves the rounds of
    blocks as full and as many blocks fit. Summing over the states again takes too many registers for that.
    """
    batch, seqlen, d_inner = shape
    segment = _segment(shape, chunk, device, _ENOUGH_BACKWARD)
    rows = batch * -(-seqlen // segment)
    blocks = rows * -(-d_inner // CHANNELS)
    if 2 * _multiprocessors(device) < blocks <= 3 * _multiprocessors(device):
        return Plan(warps=4, tile=8, blocks=3, segment=segment)  # slower by itself, but all at once
    one, two = (Plan(warps=4, tile=16, blocks=2, segment=segment, sets=sets) for sets in (1, 2))
    at_once = two.blocks * _multiprocessors(device)
    halved = rows * -(-d_inner // (2 * CHANNELS))
    fits = two.blocks * (backward_shared_bytes(two, chunk, d_state) + _RESERVED_BYTES) <= _shared_bytes(device)
    allowed = reads_y and most_sets > 1 and fits
    return two if allowed and 2 * -(-halved // at_once) <= -(-blocks // at_once) else one


def _segment(shape: tuple[int, int, int], chunk: int, device: int, enough: float) -> int:
    """Return the whole sequence if that gives enough blocks for each multiprocessor, else segments of it."""
    batch, seqlen, d_inner = shape
    rows, chunks = batch * -(-d_inner // CHANNELS), -(-seqlen // chunk)
    if rows >= enough * _multiprocessors(device):
        return chunk * chunks
    wanted = max(-(-_SEGMENTED_BLOCKS * _multiprocessors(device) // rows), -(-seqlen // _LONGEST_SEGMENT))
    return chunk * -(-chunks // max(1, min(wanted, chunks // _FEWEST_CHUNKS)))


def backward_shared_bytes(plan: Plan, chunk: int, d_state: int) -> int:
    """Return the bytes of shared memory of a block of ``scan_backward``: the arrays at the head of the kernel."""
    states = -(-d_state // plan.warps) * plan.warps
    floats = (chunk // plan.tile + 3 * plan.sets) * states * CHANNELS + 3 * chunk * CHANNELS
    floats += plan.warps * 3 * plan.tile * CHANNELS + 2 * states * chunk + chunk + 2 * plan.sets * CHANNELS
    if plan.sets > 1:
        floats += 2 * states * chunk + plan.sets * 2 * min(8, plan.tile // plan.warps) * 32 * plan.warps
    return 4 * floats


def reads_output(x: Tensor, z: Tensor | None) -> bool:
    """Return whether the backward pass can take what was before the gate from y, in place of sums over the states.

    Float16 has too few exponents: a small gate would cost y its precision.
    """
    return z is not None and x.dtype in (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """What the code and the sizes of a launch depend on."""

    x: Layout
    delta: Layout
    B: Layout
    C: Layout
    z: Layout | None
    grad_y: Layout | None
    grad_z: Layout | None
    y: Layout | None  # that the backward pass reads
    has_skip: bool
    has_bias: bool
    has_seq: bool
    softplus: bool
    device: int


@functools.lru_cache(maxsize=4096)
def _launch(
    case: Case, plan: Plan, chunk: int, direction: str, kernel: str, has_state: bool, has_initial: bool,
    has_carry: bool, save: bool,
) -> Launch:  # fmt: skip
    """Return the launch of one kernel; the last four are macros of ``scan.cuh``."""
    batch, seqlen, d_inner = case.x.shape
    channels = plan.sets * CHANNELS
    d_state, n_chunks, blocks = case.B.shape[2], -(-seqlen // chunk), -(-d_inner // channels)
    n_segments = -(-seqlen // plan.segment)
    z = case.z or case.x
    macros = nvrtc.macros(
        STATES=d_state, WARPS=plan.warps, TILE=plan.tile, CHUNK=chunk, MIN_BLOCKS=plan.blocks,
        X_TYPE=TYPES[case.x.dtype], DELTA_TYPE=TYPES[case.delta.dtype], B_TYPE=TYPES[case.B.dtype],
        C_TYPE=TYPES[case.C.dtype], Z_TYPE=TYPES[z.dtype],
        VEC=nvrtc.group_size(8, case.x, case.delta, case.z, case.grad_y, case.grad_z, case.y),
        MATRIX_VEC=nvrtc.group_size(4, case.B, case.C), HAS_D=case.has_skip, HAS_Z=case.z is not None,
        HAS_BIAS=case.has_bias, HAS_SEQ=case.has_seq, SOFTPLUS=case.softplus, EXACT=d_inner % channels == 0,
        HAS_STATE=has_state, HAS_INITIAL=has_initial, HAS_CARRY=has_carry, SAVE=save, HAS_Y=case.y is not None,
        SETS=plan.sets,
    )  # fmt: skip
    numbers = {
        "sBn": case.B.stride[2] * case.B.dtype.itemsize, "sCn": case.C.stride[2] * case.C.dtype.itemsize,
        "batches": batch, "seqlen": seqlen, "d_inner": d_inner, "n_chunks": n_chunks, "blocks": blocks,
        "padded": n_chunks * chunk, "segment": plan.segment,
    }  # fmt: skip
    for letter, own in (("x", case.x), ("d", case.delta), ("z", case.z), ("g", case.grad_y), ("B", case.B),
                        ("C", case.C), ("o", case.grad_z)):  # fmt: skip
        if own is not None:
            numbers[f"s{letter}b"], numbers[f"s{letter}t"] = own.strides
    grid, threads = {
        "scan_forward": ((batch * blocks, n_segments, 1), 32 * plan.warps),
        "scan_backward": ((batch * blocks, n_segments, 1), 32 * plan.warps),
        "scan_segment": ((batch * blocks, n_segments, 1), 32 * plan.warps),
        "chain_segments": ((-(-d_inner // 128), d_state, batch), 128),
        "sum_tokens": ((-(-seqlen // SUM_TOKENS), batch, 2), 32 * min(d_state, 16)),
        "sum_rows": ((-(-d_inner // 32), d_state + 2, 1), 256),
    }[kernel]
    shared = backward_shared_bytes(plan, chunk, d_state) if kernel == "scan_backward" else 0
    body = _SOURCE.with_name(_BODIES.get(direction, "scan_forward.cu"))
    program = Program(nvrtc.source(_SOURCE, body), (direction, *macros), case.device)
    return Launch.of(program, kernel, grid, threads, _Args, numbers, shared)


class Inputs(NamedTuple):
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
            channels_last(x), channels_last(delta), A.float().contiguous(), near(B), near(C), parameter(D),
            None if z is None else channels_last(z), parameter(delta_bias),
            None if seq_idx is None else seq_idx.to(torch.int32).contiguous(), delta_softplus,
        )  # fmt: skip

    def case(self, grad_y: Tensor | None = None, grad_z: Tensor | None = None, y: Tensor | None = None) -> Case:
        """Return what the launches depend on."""
        return Case(
            layout(self.x), layout(self.delta), layout(self.B), layout(self.C), layout(self.z), layout(grad_y),
            layout(grad_z), layout(y), self.D is not None, self.bias is not None, self.seq is not None, self.softplus,
            self.x.device.index,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor | None]:
        """Return what every kernel is given."""
        return {"x": self.x, "delta": self.delta, "A": self.A, "B": self.B, "C": self.C, "D": self.D, "z": self.z,
                "bias": self.bias, "seq": self.seq}  # fmt: skip


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
    plan = dataclasses.replace(plan, warps=4, tile=32, blocks=1, sets=1)
    case, direction = i.case(grad_y), f"SEGMENT={0 if grad_y is None else 1}"
    for kernel in ("scan_segment", "chain_segments"):
        launch = _launch(case, plan, chunk, direction, kernel, state is not None, False, False, False)
        launch(**i.tensors(), state=state, grad_y=grad_y, carry=carry, end_state=leaving, segment_steps=steps,
               segment_restarts=restarts)  # fmt: skip
    return carry, leaving


def forward(
    i: Inputs, initial_state: Tensor | None, save_states: bool, plan: Plan | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels; return y, final_state and the states at the chunks, (batch, chunk, n, d) in memory."""
    batch, seqlen, d_inner = i.x.shape
    d_state = i.A.shape[1]
    plan = plan or forward_plan(i.x.shape, d_state, chunk, i.x.device.index)
    y = i.x.new_empty(batch, seqlen, d_inner)
    chunks = i.x.new_empty(batch, -(-seqlen // chunk) if save_states else 0, d_inner, d_state, dtype=torch.float32)
    state = parameter(initial_state)
    carry = None
    if plan.segment < seqlen:
        carry, final = enter_segments(i, state, None, plan, chunk)
    else:
        final = i.x.new_empty(batch, d_inner, d_state, dtype=torch.float32)
    launch = _launch(i.case(), plan, chunk, "FORWARD", "scan_forward", state is not None, False, carry is not None,
                     save_states)  # fmt: skip
    launch(**i.tensors(), state=state, y=y, end_state=final, carry=carry, chunk_states=chunks)
    return y, final, chunks


def backward(
    i: Inputs, grad_y: Tensor, grad_final: Tensor | None, chunk_states: Tensor, plan: Plan | None, chunk: int, *,
    wants_initial: bool, grad_z: Tensor | None = None, y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernels and the sums over blocks, segments and rows of the batch.

    Args:
        i: the inputs.
        grad_y: gradient of y.
        grad_final: gradient of the final state.
        chunk_states: from `forward`.
        plan: the launch, None for `backward_plan`.
        chunk: chunk length.
        wants_initial: whether the initial state's gradient is wanted.
        grad_z: memory for that gradient, rows with neighbouring channels next to each other; fresh if None.
        y: from `forward`, where `reads_output`; None to sum over the states again.

    Returns:
        Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; those of A, D, delta_bias and initial_state in
        float32, what is not wanted empty.
    """
    batch, seqlen, d_inner = i.x.shape
    d_state = i.A.shape[1]
    plan = plan or backward_plan(i.x.shape, d_state, chunk, i.x.device.index, y is not None)
    grad_y, state = channels_last(grad_y.to(i.x.dtype)), parameter(grad_final)
    y = None if y is None else y.contiguous()
    n_segments, padded = -(-seqlen // plan.segment), -(-seqlen // chunk) * chunk
    blocks = -(-d_inner // (plan.sets * CHANNELS))
    buffer = functools.partial(torch.empty, dtype=torch.float32, device=i.x.device)
    part_B, part_C = buffer(blocks, batch, d_state, padded), buffer(blocks, batch, d_state, padded)
    part_sums = buffer(batch, n_segments, d_state + 2, d_inner)
    grad_A, grad_D, grad_bias = buffer(d_inner, d_state), buffer(d_inner), buffer(d_inner)
    carry = None
    if plan.segment < seqlen:
        carry, grad_initial = enter_segments(i, state, grad_y, plan, chunk)
    else:
        grad_initial = buffer((batch, d_inner, d_state) if wants_initial else 0)
    grad_x, grad_delta = i.x.new_empty(i.x.shape), i.delta.new_empty(i.x.shape)
    if grad_z is None:
        grad_z = i.x.new_empty(0) if i.z is None else i.z.new_empty(i.x.shape)
    grad_B, grad_C = i.B.new_empty(i.B.shape), i.C.new_empty(i.C.shape)
    case = i.case(grad_y, None if i.z is None else grad_z, y)
    for kernel in ("scan_backward", "sum_tokens", "sum_rows"):
        launch = _launch(case, plan, chunk, "BACKWARD", kernel, state is not None, wants_initial, carry is not None,
                         False)  # fmt: skip
        launch(
            **i.tensors(), grad_y=grad_y, y=y, state=state, carry=carry, chunk_states=chunk_states, grad_x=grad_x,
            grad_delta=grad_delta, grad_z=grad_z, grad_B=grad_B, grad_C=grad_C, end_state=grad_initial, part_B=part_B,
            part_C=part_C, part_sums=part_sums, grad_A=grad_A, grad_D=grad_D, grad_bias=grad_bias,
        )  # fmt: skip
    return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial
