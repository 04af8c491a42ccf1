"""The selective scan on a CPU: what the kernels of ``cpu_kernels.py`` need, and their results.

The gradients of B and C are sums over channels: within a group of `GROUP` channels first, then over the groups, both in
an order fixed by the shapes alone. Results are equal bit by bit for any number of threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.rows import address, channel_rows, copy, document_ids, floats, is_floats, new, readable, view
from mambacus.ops.selective_scan.cpu_kernels import (
    BACKWARD_BLOCKS,
    CHUNK,
    FORWARD_BLOCKS,
    GROUP,
    scan_backward,
    scan_forward,
    scan_update,
)
from mambacus.ops.simd import LANES
from mambacus.ops.threads import thread_count

FORWARD_NANOSECONDS = 0.5  # of one thread, for one state of one channel and token
BACKWARD_NANOSECONDS = 1.5


def chunk_length(d_state: int) -> int:
    """Return the number of tokens between two saved states."""
    return CHUNK


class Prepared:
    """The tensors behind the arguments of a kernel; it keeps converted copies alive while the kernel runs."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        seq_idx: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        self.x, self.delta, self.B, self.C = readable(x), readable(delta), floats(B), floats(C)
        self.D, self.z, self.delta_bias = (None if t is None else readable(t) for t in (D, z, delta_bias))
        self.batch, self.seqlen, self.d_inner = self.x.shape
        self.d_state = A.shape[1]
        self.A = channel_rows(A, self.d_inner)
        self.initial_state = None if initial_state is None else channel_rows(initial_state, self.d_inner)
        self.seq_idx = document_ids(seq_idx)
        self.tasks = self.batch * -(-self.d_inner // GROUP)

    def arguments(self, delta_softplus: bool, chunk_states: int, scratch: Tensor | None) -> list[int]:
        """Return the `GIVEN_FIELDS` arguments that `read_given` reads."""
        found = [
            self.batch, self.seqlen, self.d_inner, self.d_state, int(delta_softplus), address(self.seq_idx),
            address(self.A), address(self.B), address(self.C), address(self.initial_state), chunk_states,
            address(scratch),
        ]  # fmt: skip
        for tensor in (self.x, self.delta, self.z, self.D, self.delta_bias):
            found += view(tensor)
        return found


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel behind ``mambacus::selective_scan_forward``; see `mambacus.ops.selective_scan`."""
    g = Prepared(x, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state)
    y = new(*g.x.shape, dtype=g.x.dtype)
    final_state = new(g.batch, g.d_inner, g.d_state)
    chunk_states = new(g.batch, -(-g.seqlen // CHUNK) if save_states else 0, g.d_inner, g.d_state)
    threads = thread_count(g.tasks, FORWARD_NANOSECONDS * y.numel() * g.d_state)
    scratch = new(threads, FORWARD_BLOCKS, g.d_state, LANES)
    arguments = g.arguments(delta_softplus, address(chunk_states) if save_states else 0, scratch)
    scan_forward([*arguments, address(final_state), *view(y)], threads)
    channels = x.shape[2]
    if g.d_inner > channels:
        y, final_state, chunk_states = y[..., :channels], final_state[:, :channels], chunk_states[:, :, :channels]
    return y.to(x.dtype).contiguous(), final_state.contiguous(), chunk_states.contiguous()


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
) -> tuple[Tensor, ...]:
    """Run the kernel behind ``mambacus::selective_scan_backward``; absent inputs get empty gradients."""
    g = Prepared(x, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state)
    d_y = readable(grad_y)
    d_final = None if grad_final_state is None else channel_rows(grad_final_state, g.d_inner)
    chunk_states = channel_rows(chunk_states, g.d_inner)
    d_x, d_delta = new(*g.x.shape, dtype=g.x.dtype), new(*g.x.shape, dtype=g.delta.dtype)
    d_z = None if g.z is None else new(*g.x.shape, dtype=g.z.dtype)
    d_B, d_C = new(2, -(-g.d_inner // GROUP), g.batch, g.seqlen, g.d_state)
    d_A = new(g.batch, g.d_inner, g.d_state)
    d_initial = torch.empty_like(d_A)
    d_D, d_bias = new(2, g.batch, g.d_inner)
    threads = thread_count(g.tasks, BACKWARD_NANOSECONDS * d_x.numel() * g.d_state)
    scratch = new(threads, BACKWARD_BLOCKS, g.d_state, LANES)
    arguments = [*g.arguments(delta_softplus, address(chunk_states), scratch), *view(d_y)]
    arguments += [address(t) for t in (d_final, d_B, d_C, d_A, d_initial, d_D, d_bias)]
    scan_backward([*arguments, *view(d_x), *view(d_delta), *view(d_z)], threads)

    def give(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return x.new_empty(0)
        return grad.to(like.dtype).contiguous()

    channels = x.shape[2]
    return (
        give(d_x[..., :channels], x),
        give(d_delta[..., :channels], delta),
        give(d_A.sum(0)[:channels], A),
        give(d_B.sum(0), B),
        give(d_C.sum(0), C),
        give(d_D.sum(0)[:channels], D),
        give(None if d_z is None else d_z[..., :channels], z),
        give(d_bias.sum(0)[:channels], delta_bias),
        give(d_initial[:, :channels], initial_state),
    )


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
    """Run the kernel behind ``mambacus::selective_state_update``; see `mambacus.ops.selective_state_update`."""
    batch, channels = x.shape
    d_state = A.shape[1]
    missing = -d_state % LANES
    if missing:  # rates, states and inputs of zero change nothing
        A, B, C, state = (F.pad(t, (0, missing)) for t in (A, B, C, state))
    given, x, delta, B, C = x.dtype, readable(x), readable(delta), floats(B), floats(C)
    z, D, delta_bias = (None if t is None else readable(t) for t in (z, D, delta_bias))
    d_inner = x.shape[1]
    A, state = channel_rows(A, d_inner), channel_rows(state, d_inner)
    y = new(batch, d_inner, dtype=x.dtype)
    whole = not missing and d_inner == channels
    new_state = out if out is not None and whole and is_floats(out) else torch.empty_like(state)
    arguments = [
        batch, 1, d_inner, A.shape[1], int(delta_softplus), 0, address(A), address(B), address(C), address(state), 0, 0,
        *view(x), *view(delta), *view(z), *view(D), *view(delta_bias), address(new_state), *view(y),
    ]  # fmt: skip
    scan_update(arguments, thread_count(batch * -(-d_inner // GROUP), FORWARD_NANOSECONDS * state.numel()))
    if not whole:
        y, new_state = y[:, :channels].contiguous(), new_state[:, :channels, :d_state].contiguous()
    if out is not None and new_state is not out:
        new_state = copy(new_state, out)
    return y.to(given), new_state
