"""Numba kernels of the selective scan; `cpu.py` launches them.

A vector holds the same state index of `LANES` neighbouring channels, so the recurrence needs no sum across a vector.
Work goes chunk by chunk, and within a chunk in passes over its tokens that are independent of each other wherever the
mathematics allows, which keeps the processor's pipelines full. The backward pass walks the chunks from the last to the
first and recomputes the states of one chunk at a time from the state saved at its start.

Scratch memory is (tokens or states) x vector; addresses in it are named after what they hold, gradients ``d_...``.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from mambacus.ops.rows import (
    VIEW_FIELDS,
    View,
    clear,
    gather,
    is_padding,
    read,
    read_view,
    restarts,
    scatter,
    write,
)
from mambacus.ops.simd import (
    LANES,
    LOG2_E,
    VECTOR,
    exp2,
    load,
    load_float,
    sigmoid,
    softplus,
    splat,
    stack,
    store,
    store_float,
    total,
)
from mambacus.ops.threads import Kernel

CHUNK = 32  # tokens between two saved states
GROUP = 64  # channels of one task
VECTORS = GROUP // LANES
# Scratch of one thread, in blocks of d_state vectors
FORWARD_BLOCKS = 2 * VECTORS
BACKWARD_BLOCKS = 4 * CHUNK + 3 * VECTORS + 1
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
def read_given(p):
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
def prepare(g, b, channel, first, last, steps, drives):
    """Store step and drive (step times input) of the chunk's tokens."""
    for t in range(first, last):
        step = read(g.delta, b, t, channel)
        if g.bias.address != 0:
            step = step + read(g.bias, 0, 0, channel)
        if g.softplus:
            step = softplus(step)
        store(steps + (t - first) * VECTOR, step)
        store(drives + (t - first) * VECTOR, step * read(g.x, b, t, channel))


@njit
def finish(g, b, channel, first, last, sums, y):
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
def scan_chunk(g, b, first, last, rates, state, steps, drives, sums):
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
def scan_forward(p, thread, threads):
    """Scan every (row, group of channels) and save the state at the start of each chunk."""
    g = read_given(p)
    final_state, y = p[GIVEN_FIELDS], read_view(p, GIVEN_FIELDS + 1)
    block = g.d_state * VECTOR
    steps, drives, sums = stack(CHUNK), stack(CHUNK), stack(CHUNK)
    states = g.scratch + thread * FORWARD_BLOCKS * block
    rates = states + VECTORS * block
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


@Kernel
def scan_update(p, thread, threads):
    """Move every state by one token; here a vector holds `LANES` states of one channel, as they lie in memory."""
    g = read_given(p)
    state, y = p[GIVEN_FIELDS], read_view(p, GIVEN_FIELDS + 1)
    steps, drives, sums = stack(VECTORS), stack(VECTORS), stack(VECTORS)
    groups, row = -(-g.d_inner // GROUP), 4 * g.d_state
    for task in range(thread, g.batch * groups, threads):
        b, start = task // groups, task % groups * GROUP
        stop = min(start + GROUP, g.d_inner)
        for channel in range(start, stop, LANES):
            here = 4 * (channel - start)
            prepare(g, b, channel, 0, 1, steps + here, drives + here)
        for channel in range(start, stop):
            step, drive = load_float(steps + 4 * (channel - start)), load_float(drives + 4 * (channel - start))
            step *= LOG2_E
            here = (b * g.d_inner + channel) * row
            output = splat(0.0)
            for i in range(0, row, VECTOR):
                decay = exp2(load(g.A + channel * row + i) * step)
                h = decay * load(g.initial_state + here + i) + load(g.B + b * row + i) * drive
                store(state + here + i, h)
                output = output + h * load(g.C + b * row + i)
            store_float(sums + 4 * (channel - start), total(output))
        for channel in range(start, stop, LANES):
            finish(g, b, channel, 0, 1, sums + 4 * (channel - start), y)


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
def read_found(p):
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
def recompute_chunk(g, b, first, last, rates, state, steps, drives, sums, decays, carried):
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
def ungate(g, d, b, channel, first, last, sums, d_D):
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
def reverse_chunk(g, b, first, last, rates, steps, drives, d_sums, decays, carried, d_state, d_rates, sum_B, sum_C):
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
def unprepare(g, d, b, channel, first, last, d_steps, d_drives, d_sums, d_bias):
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
def write_totals(target, first, last, d_state, sums):
    """Write the sum of each vector of (CHUNK, d_state) to (seqlen, d_state) floats."""
    for i in range((last - first) * d_state):
        store_float(target + 4 * (first * d_state + i), total(load(sums + i * VECTOR)))


@Kernel
def scan_backward(p, thread, threads):
    """Walk the chunks of every (row, group of channels) backwards."""
    g, d = read_given(p), read_found(p)
    block = g.d_state * VECTOR
    groups, chunks = -(-g.d_inner // GROUP), -(-g.seqlen // CHUNK)
    steps, drives, sums, d_D, d_bias = stack(CHUNK), stack(CHUNK), stack(CHUNK), stack(VECTORS), stack(VECTORS)
    decays = g.scratch + thread * BACKWARD_BLOCKS * block
    carried, sum_B, sum_C = decays + CHUNK * block, decays + 2 * CHUNK * block, decays + 3 * CHUNK * block
    rates = decays + 4 * CHUNK * block
    d_states, d_rates, state = rates + VECTORS * block, rates + 2 * VECTORS * block, rates + 3 * VECTORS * block
    for task in range(thread, g.batch * groups, threads):
        b, group = task // groups, task % groups
        start, stop = group * GROUP, min((group + 1) * GROUP, g.d_inner)
        for channel in range(start, stop, LANES):
            place = (channel - start) // LANES * block
            row = 4 * (b * g.d_inner + channel) * g.d_state
            gather(rates + place, g.A + 4 * channel * g.d_state, g.d_state, LOG2_E)
            gather(d_states + place, d.final_state + row if d.final_state else 0, g.d_state, ONE)
        clear(d_rates, VECTORS * g.d_state)
        clear(d_D, VECTORS)
        clear(d_bias, VECTORS)
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
