"""The selective scan by Triton: choice of the launch, buffers, and the launches of ``gpu_triton_kernels.py``.

One program walks BLOCK channels of one row through the sequence. Where that gives too few programs to fill the GPU
(small batch, long sequence), the sequence is cut into segments: a first kernel finds the state after each segment as if
it began from zero, a second chains those into the states that enter the segments, then all segments run at once. The
results do not depend on the order in which programs run: sums over programs go through buffers, not atomics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from mambacus.ops.selective_scan import gpu_triton_kernels as kernels
from mambacus.ops.selective_scan.gpu_cuda import chunk_length

# Warps a multiprocessor should get: with fewer than the first number the sequence is cut, into enough segments for the
# second (measured on an H100: three rounds of short programs beat one round of long ones)
_ENOUGH_WARPS, _WANTED_WARPS = 8, 24
_MULTIPROCESSORS_OF_THE_INTERPRETER = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels are launched.

    Attributes:
        block: channels of one program, 32 x (channels of one thread); at least 64.
        tile: tokens held in registers at once; divides the chunk length.
        segment: tokens of one program, a multiple of the chunk length.
    """

    block: int
    tile: int
    segment: int


def forward_plan(batch: int, seqlen: int, d_inner: int, d_state: int, device: torch.device) -> Plan:
    """Return the launch of the forward kernels."""
    return _plan(batch, seqlen, d_inner, d_state, device, block=64, tile=8)


def backward_plan(batch: int, seqlen: int, d_inner: int, d_state: int, device: torch.device) -> Plan:
    """Return the launch of the backward kernels."""
    return _plan(batch, seqlen, d_inner, d_state, device, block=64, tile=8)


def _plan(batch: int, seqlen: int, d_inner: int, d_state: int, device: torch.device, *, block: int, tile: int) -> Plan:
    """Cut the sequence into the fewest segments that fill the GPU."""
    chunk = chunk_length(d_state)
    chunks = triton.cdiv(seqlen, chunk)
    programs = batch * triton.cdiv(d_inner, block)
    wanted = 1
    if programs < _ENOUGH_WARPS * _multiprocessors(device):
        wanted = triton.cdiv(_WANTED_WARPS * _multiprocessors(device), programs)
    return Plan(block, tile, chunk * triton.cdiv(chunks, min(wanted, chunks)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_OF_THE_INTERPRETER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels next to each other, copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The inputs as the kernels want them."""

    x: Tensor
    delta: Tensor
    A2: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    seq: Tensor | None
    padded: int
    flags: dict[str, bool]

    @staticmethod
    def of(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool, seq_idx: Tensor | None,
    ) -> _Inputs:  # fmt: skip
        """Put B and C as (batch, d_state, padded seqlen), and log2(e) A as (d_state, d_inner)."""
        seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        padded = triton.cdiv(x.shape[1], 64) * 64
        return _Inputs(
            _channels_last(x), _channels_last(delta), (A.float() * kernels.LOG2_E.value).t().contiguous(),
            _transposed(B, seq, padded), _transposed(C, seq, padded), _contiguous(D),
            None if z is None else _channels_last(z), _contiguous(delta_bias), seq, padded,
            {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None,
                 "HAS_SEQ": seq is not None, "SOFTPLUS": delta_softplus, "PRECISE": x.dtype == torch.float32},
        )  # fmt: skip

    def only(self, *names: str) -> dict[str, bool]:
        """Return those of the flags that a kernel takes."""
        return {name: self.flags[name] for name in names}


def _transposed(matrix: Tensor, seq: Tensor | None, padded: int) -> Tensor:
    """Return B or C as (batch, d_state, padded), where a thread loads the values of many tokens at once."""
    batch, seqlen, d_state = matrix.shape
    out = matrix.new_empty(batch, d_state, padded)
    states = min(64, triton.next_power_of_2(d_state))
    kernels.transpose_matrix[(padded // 64, batch, triton.cdiv(d_state, states))](
        matrix, out, seq, seqlen, d_state, padded, *matrix.stride(), HAS_SEQ=seq is not None, ROWS=64, STATES=states
    )
    return out


def _strides(*tensors: Tensor | None) -> list[int]:
    """Return batch and token strides of each tensor, zeros for None."""
    return [stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2])]


def _state_first(state: Tensor | None, like: Tensor, d_state: int) -> Tensor:
    """Return a fresh (batch, d_state, d_inner) float32 copy of a state, or zeros."""
    batch, _, d_inner = like.shape
    if state is None:
        return like.new_zeros(batch, d_state, d_inner, dtype=torch.float32)
    return state.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    save_states: bool,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels behind ``mambacus::selective_scan_forward``.

    Returns:
        y, final_state, and the states at the chunks' first tokens for `backward` (its last two dimensions hold
        (d_state, d_inner) in this order whatever the shape says).
    """
    batch, seqlen, d_inner = x.shape
    d_state = A.shape[1]
    plan = plan or forward_plan(batch, seqlen, d_inner, d_state, x.device)
    chunk = chunk_length(d_state)
    n_chunks, n_segments, blocks = (triton.cdiv(seqlen, chunk), triton.cdiv(seqlen, plan.segment),
                                    triton.cdiv(d_inner, plan.block))  # fmt: skip
    y = x.new_empty(batch, seqlen, d_inner)
    chunk_states = x.new_empty(batch, n_chunks if save_states else 0, d_inner, d_state, dtype=torch.float32)
    with _on(x.device):
        i = _Inputs.of(x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx)
        final = _state_first(initial_state, x, d_state)
        carry = final
        sizes = (seqlen, d_inner, d_state, plan.segment, n_segments)
        grid, options = (blocks, batch, n_segments), {"TILE": plan.tile, "BLOCK": plan.block, "num_warps": 1}
        if n_segments > 1:
            carry, exponent, shifts = _segment_buffers(x, d_state, n_segments)
            kernels.segment_states[grid](
                i.x, i.delta, i.A2, i.B, i.bias, i.seq, carry, exponent, shifts, *sizes, i.padded,
                *_strides(i.x, i.delta), **i.only("HAS_BIAS", "HAS_SEQ", "SOFTPLUS", "PRECISE"), **options,
            )  # fmt: skip
            _chain(i, carry, exponent, shifts, final, reverse=False)
        kernels.scan_forward[grid](
            i.x, i.delta, i.A2, i.B, i.C, i.D, i.z, i.bias, i.seq, y, carry, chunk_states, *sizes, n_chunks, i.padded,
            *_strides(i.x, i.delta, i.z), **i.flags, SAVE=save_states, CHUNK=chunk, **options,
        )  # fmt: skip
        return y, final.transpose(1, 2).contiguous(), chunk_states


def _segment_buffers(x: Tensor, d_state: int, n_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `chain_segments` reads: states (zeroed), sums of steps, and of restarts."""
    batch, _, d_inner = x.shape
    return (
        x.new_zeros(batch, n_segments, d_state, d_inner, dtype=torch.float32),
        x.new_empty(batch, n_segments, d_inner, dtype=torch.float32),
        x.new_empty(batch, n_segments, dtype=torch.float32),
    )


def _chain(i: _Inputs, carry: Tensor, exponent: Tensor, shifts: Tensor, start: Tensor, *, reverse: bool) -> None:
    batch, n_segments, d_state, d_inner = carry.shape
    kernels.chain_segments[(triton.cdiv(d_inner, 64), batch, d_state)](
        carry,
        exponent,
        shifts,
        start,
        i.A2,
        d_inner,
        d_state,
        n_segments,
        REVERSE=reverse,
        BLOCK=64,
        num_warps=1,
        **i.only("PRECISE"),
    )


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_states: Tensor,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, ...]:
    """Run the kernels behind ``mambacus::selective_scan_backward``.

    Returns:
        Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; an empty tensor for each that is None.

    Memory:
        Besides the gradients: one state a tile (``4 d_state / tile`` bytes a token and channel), and partial sums of
        the gradients of B and C (``8 d_state / block`` bytes a token and channel).
    """
    batch, seqlen, d_inner = x.shape
    d_state = A.shape[1]
    plan = plan or backward_plan(batch, seqlen, d_inner, d_state, x.device)
    chunk = chunk_length(d_state)
    n_chunks, n_segments, blocks = (triton.cdiv(seqlen, chunk), triton.cdiv(seqlen, plan.segment),
                                    triton.cdiv(d_inner, plan.block))  # fmt: skip
    with _on(x.device):
        i = _Inputs.of(x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx)
        ready = _channels_last(grad_y)
        entering = _state_first(grad_final_state, x, d_state)
        carry = entering
        sizes = (seqlen, d_inner, d_state, plan.segment, n_segments)
        grid, options = (blocks, batch, n_segments), {"TILE": plan.tile, "BLOCK": plan.block, "num_warps": 1}
        if n_segments > 1:
            carry, exponent, shifts = _segment_buffers(x, d_state, n_segments)
            kernels.segment_adjoints[grid](
                ready, i.delta, i.A2, i.C, i.z, i.bias, i.seq, carry, exponent, shifts, *sizes, i.padded,
                *_strides(ready, i.delta, i.z), **i.only("HAS_Z", "HAS_BIAS", "HAS_SEQ", "SOFTPLUS", "PRECISE"),
                **options,
            )  # fmt: skip
            _chain(i, carry, exponent, shifts, entering, reverse=True)
        buffer = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
        tile_states = buffer(blocks * batch * n_segments, chunk // plan.tile, d_state, plan.block)
        sum_A = x.new_zeros(batch, n_segments, d_state, d_inner, dtype=torch.float32)
        sum_B, sum_C = buffer(blocks, batch, d_state, i.padded), buffer(blocks, batch, d_state, i.padded)
        sum_D, sum_bias = buffer(batch, n_segments, d_inner), buffer(batch, n_segments, d_inner)
        grad_x = x.new_empty(x.shape)
        grad_delta = delta.new_empty(delta.shape)
        grad_z = x.new_empty(0) if z is None else z.new_empty(z.shape)
        kernels.scan_backward[grid](
            ready, i.x, i.delta, i.A2, i.B, i.C, i.D, i.z, i.bias, i.seq, chunk_states, carry, tile_states,
            grad_x, grad_delta, grad_z, sum_A, sum_B, sum_C, sum_D, sum_bias, *sizes, n_chunks, batch, i.padded,
            *_strides(ready, i.x, i.delta, i.z), **i.flags, CHUNK=chunk, **options,
        )  # fmt: skip
        return (
            grad_x,
            grad_delta,
            sum_A.sum((0, 1)).t().to(A.dtype, memory_format=torch.contiguous_format),
            _token_gradient(sum_B, B),
            _token_gradient(sum_C, C),
            x.new_empty(0) if D is None else sum_D.sum((0, 1)).to(D.dtype),
            grad_z,
            x.new_empty(0) if delta_bias is None else sum_bias.sum((0, 1)).to(delta_bias.dtype),
            x.new_empty(0) if initial_state is None else _initial_gradient(entering, initial_state),
        )


def _token_gradient(partial: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of B or C from its partial sums (block, batch, d_state, padded)."""
    total = partial.sum(0)[..., : like.shape[1]]
    return total.transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format)


def _initial_gradient(leaving: Tensor, like: Tensor) -> Tensor:
    """Return the initial state's gradient, (batch, d_inner, d_state), from the adjoint that left the first token."""
    return leaving.transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def update(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::selective_state_update``; the new state goes to ``out``, if given.

    A program reads all of its states before it writes one, so ``out`` may be ``state``.
    """
    batch, d_inner = x.shape
    d_state = A.shape[1]
    y = x.new_empty(batch, d_inner)
    if out is not None and out.is_contiguous() and out.dtype == torch.float32:
        new_state = out
    else:
        new_state = state.new_empty(batch, d_inner, d_state, dtype=torch.float32)
    states = triton.next_power_of_2(d_state)
    block = max(1, min(32, 2048 // states))
    x, delta, z = _channels_last(x), _channels_last(delta), None if z is None else _channels_last(z)
    with _on(x.device):
        kernels.state_update[(triton.cdiv(d_inner, block), batch)](
            state, x, delta, A.contiguous(), B, C, _contiguous(D), z, _contiguous(delta_bias), y, new_state, d_inner,
            d_state, x.stride(0), delta.stride(0), *B.stride(), *C.stride(), 0 if z is None else z.stride(0),
            *state.stride(),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            BLOCK=block, STATES=states, num_warps=4,
        )  # fmt: skip
    return y, new_state if out is None or out is new_state else out.copy_(new_state)
