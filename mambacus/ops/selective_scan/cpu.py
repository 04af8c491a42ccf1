"""The selective scan on a CPU: numba kernels, vectorised over channels, parallel over (row, group of channels).

Inside a kernel a vector holds the same state index of `LANES` neighbouring channels, so the recurrence needs no sum
across a vector. Work goes chunk by chunk, and within a chunk in passes over its tokens that are independent of each other
wherever the mathematics allows, which keeps the processor's pipelines full. The backward pass walks the chunks from the
last to the first and recomputes the states of one chunk at a time from the state saved at its start.

The gradients of B and C are sums over channels: within a group of `GROUP` channels first, then over the groups, both in
an order fixed by the shapes alone. Results are equal bit by bit for any number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mambacus.ops.rows import (
    VIEW_FIELDS,
    View,
    address,
    document_ids,
    floats,
    is_padding,
    read,
    read_view,
    readable,
    restarts,
    view,
    write,
)
from mambacus.ops.simd import LANES, LOG2_E, exp2, load, load_float, sigmoid, softplus, splat, store, store_float, total
from mambacus.ops.threads import Kernel, thread_count

CHUNK = 32  # tokens between two saved states
GROUP = 64  # channels of one task
VECTOR = 4 * LANES  # bytes
FORWARD_NANOSECONDS = 0.5  # of one thread, for one state of one channel and token
BACKWARD_NANOSECONDS = 1.5
LN_2 = np.float32(0.6931471805599453)
ONE = np.float32(1.0)


class Given(NamedTuple):
    """The inputs of the scan as a kernel sees them; B, C, A and the states are addresses of contiguous float32."""

    batch: int
    seqlen: int
    d_inner: int
    d_state: int
    softplus: int
    seq_idx: int  # address of int32, 0 if absent
    A: int
    B: int
    C: int
    initial_state: int  # 0 if absent
    chunk_states: int  # 0 if not wanted
    scratch: int
    x: View
    delta: View
    z: View
    D: View
    bias: View


GIVEN_FIELDS = 12 + 5 * VIEW_FIELDS


@njit
def read_given(p):  # type: ignore[no-untyped-def]
    """Return the inputs, which are the first `GIVEN_FIELDS` arguments of every kernel."""
    return Given(
        p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11],
        read_view(p, 12),
        read_view(p, 12 + VIEW_FIELDS),
        read_view(p, 12 + 2 * VIEW_FIELDS),
        read_view(p, 12 + 3 * VIEW_FIELDS),
        read_view(p, 12 + 4 * VIEW_FIELDS),
    )  # fmt: skip


@njit
def gather(target, source, d_state, factor):  # type: ignore[no-untyped-def]
    """Turn (LANES, d_state) floats into d_state vectors times ``factor``; a source of 0 gives zeros."""
    for n in range(d_state):
        for lane in range(LANES):
            value = np.float32(0.0) if source == 0 else load_float(source + 4 * (lane * d_state + n)) * factor
            store_float(target + 4 * (n * LANES + lane), value)


@njit
def scatter(target, source, d_state):  # type: ignore[no-untyped-def]
    """Turn d_state vectors into (LANES, d_state) floats."""
    for n in range(d_state):
        for lane in range(LANES):
            store_float(target + 4 * (lane * d_state + n), load_float(source + 4 * (n * LANES + lane)))


@njit
def clear(target, count):  # type: ignore[no-untyped-def]
    """Fill ``count`` vectors with zeros."""
    for i in range(count):
        store(target + i * VECTOR, splat(0.0))


@njit
def prepare(g, b, channel, first, last, steps, drives):  # type: ignore[no-untyped-def]
    """Store step and drive (step times input) of the chunk's tokens; return nothing for padding."""
    for t in range(first, last):
        step = read(g.delta, b, t, channel)
        if g.bias.address != 0:
            step = step + read(g.bias, 0, 0, channel)
        if g.softplus:
            step = softplus(step)
        store(steps + (t - first) * VECTOR, step)
        store(drives + (t - first) * VECTOR, step * read(g.x, b, t, channel))


@njit
def finish(g, b, channel, first, last, sums, y):  # type: ignore[no-untyped-def]
    """Add the skip connection to the chunk's sums over states, gate them and write them to ``y``."""
    for t in range(first, last):
        if is_padding(g.seq_idx, b * g.seqlen + t):
            write(y, b, t, channel, splat(0.0))
            continue
        output = load(sums + (t - first) * VECTOR)
        if g.D.address != 0:
            output = output + read(g.x, b, t, channel) * read(g.D, 0, 0, channel)
        if g.z.address != 0:
            gate = read(g.z, b, t, channel)
            output = output * (gate * sigmoid(gate))
        write(y, b, t, channel, output)


@njit
def scan_chunk(g, b, first, last, rates, state, steps, drives, sums):  # type: ignore[no-untyped-def]
    """Move the state of `LANES` channels over the chunk and store the sums C . h of its tokens."""
    for t in range(first, last):
        token = b * g.seqlen + t
        if is_padding(g.seq_idx, token):
            continue
        if restarts(g.seq_idx, token, t):
            clear(state, g.d_state)
        step, drive = load(steps + (t - first) * VECTOR), load(drives + (t - first) * VECTOR)
        output = splat(0.0)
        for n in range(g.d_state):
            decay = exp2(step * load(rates + n * VECTOR))
            h = decay * load(state + n * VECTOR) + drive * load_float(g.B + 4 * (token * g.d_state + n))
            store(state + n * VECTOR, h)
            output = output + h * load_float(g.C + 4 * (token * g.d_state + n))
        store(sums + (t - first) * VECTOR, output)


@Kernel
def scan_forward(p, thread, threads):  # type: ignore[no-untyped-def]
    """Scan every (row, group of channels) and save the state at the start of each chunk."""
    g = read_given(p)
    final_state, y = p[GIVEN_FIELDS], read_view(p, GIVEN_FIELDS + 1)
    block = g.d_state * VECTOR
    steps = g.scratch + thread * (3 * CHUNK * VECTOR + 2 * GROUP // LANES * block)
    drives, sums = steps + CHUNK * VECTOR, steps + 2 * CHUNK * VECTOR
    states = steps + 3 * CHUNK * VECTOR
    rates = states + GROUP // LANES * block
    groups, chunks = -(-g.d_inner // GROUP), -(-g.seqlen // CHUNK)
    for task in range(thread, g.batch * groups, threads):
        b, start = task // groups, task % groups * GROUP
        stop = min(start + GROUP, g.d_inner)
        for channel in range(start, stop, LANES):
            place = (channel - start) // LANES * block
            gather(rates + place, g.A + 4 * channel * g.d_state, g.d_state, LOG2_E)
            row = 4 * (b * g.d_inner + channel) * g.d_state
            gather(states + place, g.initial_state + row if g.initial_state else 0, g.d_state, ONE)
        for chunk in range(chunks):
            first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, g.seqlen)
            for channel in range(start, stop, LANES):
                place = (channel - start) // LANES * block
                if g.chunk_states:
                    row = 4 * ((b * chunks + chunk) * g.d_inner + channel) * g.d_state
                    scatter(g.chunk_states + row, states + place, g.d_state)
                prepare(g, b, channel, first, last, steps, drives)
                scan_chunk(g, b, first, last, rates + place, states + place, steps, drives, sums)
                finish(g, b, channel, first, last, sums, y)
        for channel in range(start, stop, LANES):
            row = 4 * (b * g.d_inner + channel) * g.d_state
            scatter(final_state + row, states + (channel - start) // LANES * block, g.d_state)


class Found(NamedTuple):
    """The gradients as the backward kernel sees them; addresses are of contiguous float32."""

    y: View  # gradient of the output, an input
    final_state: int  # gradient of the final state, an input; 0 if absent
    B: int  # (groups, batch, seqlen, d_state)
    C: int  # (groups, batch, seqlen, d_state)
    A: int  # (batch, d_inner, d_state)
    initial_state: int  # (batch, d_inner, d_state)
    D: int  # (batch, d_inner)
    bias: int  # (batch, d_inner)
    x: View
    delta: View
    z: View


@njit
def read_found(p):  # type: ignore[no-untyped-def]
    """Return the gradients, which follow the inputs among the backward kernel's arguments."""
    first = GIVEN_FIELDS + VIEW_FIELDS + 7
    return Found(
        read_view(p, GIVEN_FIELDS),
        p[first - 7], p[first - 6], p[first - 5], p[first - 4], p[first - 3], p[first - 2], p[first - 1],
        read_view(p, first),
        read_view(p, first + VIEW_FIELDS),
        read_view(p, first + 2 * VIEW_FIELDS),
    )  # fmt: skip


@njit
def recompute_chunk(g, b, first, last, rates, state, steps, drives, sums, decays, carried):  # type: ignore[no-untyped-def]
    """Do `scan_chunk` again and keep, for each token and state, the decay and the decayed state before the input."""
    for t in range(first, last):
        token = b * g.seqlen + t
        if is_padding(g.seq_idx, token):
            continue
        fresh = restarts(g.seq_idx, token, t)
        if fresh:
            clear(state, g.d_state)
        step, drive = load(steps + (t - first) * VECTOR), load(drives + (t - first) * VECTOR)
        place = (t - first) * g.d_state * VECTOR
        output = splat(0.0)
        for n in range(g.d_state):
            decay = exp2(step * load(rates + n * VECTOR))
            before = decay * load(state + n * VECTOR)
            h = before + drive * load_float(g.B + 4 * (token * g.d_state + n))
            store(decays + place + n * VECTOR, decay)
            store(carried + place + n * VECTOR, before)
            store(state + n * VECTOR, h)
            output = output + h * load_float(g.C + 4 * (token * g.d_state + n))
        store(sums + (t - first) * VECTOR, output)
        if fresh:
            clear(decays + place, g.d_state)  # no gradient reaches the document before


@njit
def ungate(g, d, b, channel, first, last, sums, d_D):  # type: ignore[no-untyped-def]
    """Replace the chunk's sums by their gradients; write the gradient of z and add up that of D."""
    skip = splat(0.0)
    if g.D.address != 0:
        skip = read(g.D, 0, 0, channel)
    d_skip = load(d_D)
    for t in range(first, last):
        if is_padding(g.seq_idx, b * g.seqlen + t):
            if g.z.address != 0:
                write(d.z, b, t, channel, splat(0.0))
            continue
        place = sums + (t - first) * VECTOR
        x, d_output = read(g.x, b, t, channel), read(d.y, b, t, channel)
        if g.z.address != 0:
            z = read(g.z, b, t, channel)
            s = sigmoid(z)
            d_gate = d_output * (load(place) + skip * x)
            write(d.z, b, t, channel, d_gate * (s * (z * (splat(1.0) - s) + ONE)))
            d_output = d_output * (z * s)
        store(place, d_output)
        d_skip = d_skip + d_output * x
    store(d_D, d_skip)


@njit
def reverse_chunk(  # type: ignore[no-untyped-def]
    g, b, first, last, rates, steps, drives, d_sums, decays, carried, d_state, d_rates, sum_B, sum_C
):
    """Carry the state's gradient back over the chunk.

    Replaces the chunk's steps and drives by their gradients (that of the step for decays in base 2) and adds the shares
    of these channels to the gradients of A, B and C.
    """
    for t in range(last - 1, first - 1, -1):
        token = b * g.seqlen + t
        if is_padding(g.seq_idx, token):
            continue
        here, place = (t - first) * VECTOR, (t - first) * g.d_state * VECTOR
        step, drive, d_sum = load(steps + here), load(drives + here), load(d_sums + here)
        d_step, d_drive = splat(0.0), splat(0.0)
        for n in range(g.d_state):
            i = n * VECTOR
            B, C = load_float(g.B + 4 * (token * g.d_state + n)), load_float(g.C + 4 * (token * g.d_state + n))
            before = load(carried + place + i)
            d_h = load(d_state + i) + d_sum * C
            store(sum_C + place + i, load(sum_C + place + i) + d_sum * (before + drive * B))
            store(sum_B + place + i, load(sum_B + place + i) + d_h * drive)
            d_drive = d_drive + d_h * B
            d_exponent = d_h * before
            d_step = d_step + d_exponent * load(rates + i)
            store(d_rates + i, load(d_rates + i) + d_exponent * step)
            store(d_state + i, d_h * load(decays + place + i))
        store(steps + here, d_step)
        store(drives + here, d_drive)


@njit
def unprepare(g, d, b, channel, first, last, d_steps, d_drives, d_sums, d_bias):  # type: ignore[no-untyped-def]
    """Write the gradients of x and delta for the chunk and add up that of the bias."""
    skip, bias = splat(0.0), splat(0.0)
    if g.D.address != 0:
        skip = read(g.D, 0, 0, channel)
    if g.bias.address != 0:
        bias = read(g.bias, 0, 0, channel)
    d_shift = load(d_bias)
    for t in range(first, last):
        if is_padding(g.seq_idx, b * g.seqlen + t):
            write(d.x, b, t, channel, splat(0.0))
            write(d.delta, b, t, channel, splat(0.0))
            continue
        here = (t - first) * VECTOR
        raw = read(g.delta, b, t, channel) + bias
        d_drive = load(d_drives + here)
        d_step = load(d_steps + here) * LN_2 + d_drive * read(g.x, b, t, channel)
        step = raw
        if g.softplus:
            step = softplus(raw)
            d_step = d_step * sigmoid(raw)
        write(d.x, b, t, channel, d_drive * step + load(d_sums + here) * skip)
        write(d.delta, b, t, channel, d_step)
        d_shift = d_shift + d_step
    store(d_bias, d_shift)


@njit
def write_totals(target, first, last, d_state, sums):  # type: ignore[no-untyped-def]
    """Write the sum of each vector of (CHUNK, d_state) to (seqlen, d_state) floats."""
    for i in range((last - first) * d_state):
        store_float(target + 4 * (first * d_state + i), total(load(sums + i * VECTOR)))


@Kernel
def scan_backward(p, thread, threads):  # type: ignore[no-untyped-def]
    """Walk the chunks of every (row, group of channels) backwards."""
    g, d = read_given(p), read_found(p)
    block, vectors = g.d_state * VECTOR, GROUP // LANES
    groups, chunks = -(-g.d_inner // GROUP), -(-g.seqlen // CHUNK)
    # Scratch of one thread: three vectors per token, four blocks per token, three blocks and two vectors per channel vector.
    steps = g.scratch + thread * ((3 * CHUNK + 2 * vectors) * VECTOR + (4 * CHUNK + 3 * vectors + 1) * block)
    drives, sums, d_D = steps + CHUNK * VECTOR, steps + 2 * CHUNK * VECTOR, steps + 3 * CHUNK * VECTOR
    d_bias = d_D + vectors * VECTOR
    decays = d_bias + vectors * VECTOR
    carried, sum_B, sum_C = decays + CHUNK * block, decays + 2 * CHUNK * block, decays + 3 * CHUNK * block
    rates = decays + 4 * CHUNK * block
    d_states, d_rates, state = rates + vectors * block, rates + 2 * vectors * block, rates + 3 * vectors * block
    for task in range(thread, g.batch * groups, threads):
        b, group = task // groups, task % groups
        start, stop = group * GROUP, min((group + 1) * GROUP, g.d_inner)
        for channel in range(start, stop, LANES):
            place = (channel - start) // LANES * block
            row = 4 * (b * g.d_inner + channel) * g.d_state
            gather(rates + place, g.A + 4 * channel * g.d_state, g.d_state, LOG2_E)
            gather(d_states + place, d.final_state + row if d.final_state else 0, g.d_state, ONE)
        clear(d_rates, vectors * g.d_state)
        clear(d_D, 2 * vectors)
        for chunk in range(chunks - 1, -1, -1):
            first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, g.seqlen)
            clear(sum_B, 2 * CHUNK * g.d_state)
            for channel in range(start, stop, LANES):
                index = (channel - start) // LANES
                place = index * block
                row = 4 * ((b * chunks + chunk) * g.d_inner + channel) * g.d_state
                gather(state, g.chunk_states + row, g.d_state, ONE)
                prepare(g, b, channel, first, last, steps, drives)
                recompute_chunk(g, b, first, last, rates + place, state, steps, drives, sums, decays, carried)
                ungate(g, d, b, channel, first, last, sums, d_D + index * VECTOR)
                reverse_chunk(
                    g, b, first, last, rates + place, steps, drives, sums, decays, carried, d_states + place,
                    d_rates + place, sum_B, sum_C,
                )  # fmt: skip
                unprepare(g, d, b, channel, first, last, steps, drives, sums, d_bias + index * VECTOR)
            row = 4 * (group * g.batch + b) * g.seqlen * g.d_state
            write_totals(d.B + row, first, last, g.d_state, sum_B)
            write_totals(d.C + row, first, last, g.d_state, sum_C)
        for channel in range(start, stop, LANES):
            index = (channel - start) // LANES
            row = 4 * (b * g.d_inner + channel)
            scatter(d.A + row * g.d_state, d_rates + index * block, g.d_state)
            scatter(d.initial_state + row * g.d_state, d_states + index * block, g.d_state)
            store(d.D + row, load(d_D + index * VECTOR))
            store(d.bias + row, load(d_bias + index * VECTOR))


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

    def arguments(self, delta_softplus: bool, chunk_states: int, scratch: Tensor) -> list[int]:
        """Return the `GIVEN_FIELDS` arguments that `read_given` reads."""
        found = [
            self.batch, self.seqlen, self.d_inner, self.d_state, int(delta_softplus), address(self.seq_idx),
            address(self.A), address(self.B), address(self.C), address(self.initial_state), chunk_states,
            address(scratch),
        ]  # fmt: skip
        for tensor in (self.x, self.delta, self.z, self.D, self.delta_bias):
            found += view(tensor)
        return found


def channel_rows(tensor: Tensor, d_inner: int) -> Tensor:
    """Return (..., channels, d_state) as contiguous float32 with zeros up to ``d_inner`` channels."""
    missing = d_inner - tensor.shape[-2]
    return floats(F.pad(tensor, (0, 0, 0, missing)) if missing else tensor)


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
    y = torch.empty(g.x.shape, dtype=g.x.dtype)
    final_state = torch.empty(g.batch, g.d_inner, g.d_state)
    chunk_states = torch.empty(g.batch, -(-g.seqlen // CHUNK) if save_states else 0, g.d_inner, g.d_state)
    threads = thread_count(g.tasks, FORWARD_NANOSECONDS * y.numel() * g.d_state)
    scratch = torch.empty(threads, 3 * CHUNK * LANES + 2 * GROUP * g.d_state)
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
    d_x, d_delta = torch.empty(g.x.shape, dtype=g.x.dtype), torch.empty(g.x.shape, dtype=g.delta.dtype)
    d_z = None if g.z is None else torch.empty(g.x.shape, dtype=g.z.dtype)
    d_B, d_C = torch.empty(2, -(-g.d_inner // GROUP), g.batch, g.seqlen, g.d_state)
    d_A, d_initial = torch.empty(2, g.batch, g.d_inner, g.d_state)
    d_D, d_bias = torch.empty(2, g.batch, g.d_inner)
    threads = thread_count(g.tasks, BACKWARD_NANOSECONDS * d_x.numel() * g.d_state)
    vectors = GROUP // LANES
    scratch = torch.empty(threads, LANES * (3 * CHUNK + 2 * vectors + (4 * CHUNK + 3 * vectors + 1) * g.d_state))
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
