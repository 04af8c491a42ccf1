"""Numba kernels of the causal convolution; `cpu.py` launches them.

A vector holds `LANES` neighbouring channels. Each channel carries a window of its last ``d_conv`` inputs through the
row, oldest first; a restart clears it, padding leaves it alone. The backward pass goes through the row forwards, to
find the gradient of every sum before the activation and those of taps and bias, and then backwards with the window's
gradient.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from mambacus.ops.rows import VIEW_FIELDS, View, clear, gather, is_padding, read, read_view, restarts, scatter, write
from mambacus.ops.simd import LANES, VECTOR, load, load_float, sigmoid, splat, stack, store, store_float
from mambacus.ops.threads import Kernel

TILE = 32  # tokens taken through one vector of channels before the next
GROUP = 64  # channels of one task
VECTORS = GROUP // LANES
ONE = np.float32(1.0)


class Given(NamedTuple):
    """The inputs of the convolution as a kernel sees them; weight and state are addresses of contiguous float32."""

    batch: int
    seqlen: int
    d_inner: int
    d_conv: int
    silu: int
    seq_idx: int  # address of int32, 0 if absent
    weight: int  # (d_inner, d_conv)
    initial_state: int  # (batch, d_inner, d_conv), 0 if absent
    scratch: int
    x: View
    bias: View


GIVEN_FIELDS = 9 + 2 * VIEW_FIELDS


@njit
def read_given(p):
    """Return the inputs, which are the first `GIVEN_FIELDS` arguments of every kernel."""
    views = read_view(p, 9), read_view(p, 9 + VIEW_FIELDS)
    return Given(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], views[0], views[1])


@njit
def begin(g, b, start, stop, taps, windows):
    """Gather the taps of a group of channels and their windows before the row."""
    for channel in range(start, stop, LANES):
        place = (channel - start) // LANES * g.d_conv * VECTOR
        row = 4 * (b * g.d_inner + channel) * g.d_conv
        gather(taps + place, g.weight + 4 * channel * g.d_conv, g.d_conv, ONE)
        gather(windows + place, g.initial_state + row if g.initial_state else 0, g.d_conv, ONE)


@njit
def slide(g, b, t, channel, window, taps):
    """Move the window to token t and return its product with the taps."""
    if restarts(g.seq_idx, b * g.seqlen + t, t):
        clear(window, g.d_conv)
    total = splat(0.0)
    if g.bias.address != 0:
        total = read(g.bias, 0, 0, channel)
    last = (g.d_conv - 1) * VECTOR
    for i in range(0, last, VECTOR):
        older = load(window + i + VECTOR)
        store(window + i, older)
        total = total + older * load(taps + i)
    newest = read(g.x, b, t, channel)
    store(window + last, newest)
    return total + newest * load(taps + last)


@njit
def convolve(g, b, first, last, channel, window, taps, y):
    """Filter the tokens [first, last) of one vector of channels."""
    for t in range(first, last):
        if is_padding(g.seq_idx, b * g.seqlen + t):
            write(y, b, t, channel, splat(0.0))
            continue
        total = slide(g, b, t, channel, window, taps)
        if g.silu:
            total = total * sigmoid(total)
        write(y, b, t, channel, total)


@njit
def convolve_four(g, b, first, last, channel, window, taps, y):
    """As `convolve`, of four taps, with window and taps in registers; the sums are in the same order."""
    tap0, tap1, tap2, tap3 = load(taps), load(taps + VECTOR), load(taps + 2 * VECTOR), load(taps + 3 * VECTOR)
    x0, x1, x2, x3 = load(window), load(window + VECTOR), load(window + 2 * VECTOR), load(window + 3 * VECTOR)
    bias = splat(0.0)
    if g.bias.address != 0:
        bias = read(g.bias, 0, 0, channel)
    for t in range(first, last):
        token = b * g.seqlen + t
        if is_padding(g.seq_idx, token):
            write(y, b, t, channel, splat(0.0))
            continue
        if restarts(g.seq_idx, token, t):
            x1 = x2 = x3 = splat(0.0)
        x0, x1, x2, x3 = x1, x2, x3, read(g.x, b, t, channel)
        total = (((bias + x0 * tap0) + x1 * tap1) + x2 * tap2) + x3 * tap3
        if g.silu:
            total = total * sigmoid(total)
        write(y, b, t, channel, total)
    store(window, x0)
    store(window + VECTOR, x1)
    store(window + 2 * VECTOR, x2)
    store(window + 3 * VECTOR, x3)


@Kernel
def conv_forward(p, thread, threads):
    """Convolve every (row, group of channels)."""
    g = read_given(p)
    final_state, y = p[GIVEN_FIELDS], read_view(p, GIVEN_FIELDS + 1)
    block = g.d_conv * VECTOR
    taps = g.scratch + thread * 2 * VECTORS * block
    windows = taps + VECTORS * block
    groups = -(-g.d_inner // GROUP)
    for task in range(thread, g.batch * groups, threads):
        b, start = task // groups, task % groups * GROUP
        stop = min(start + GROUP, g.d_inner)
        begin(g, b, start, stop, taps, windows)
        for first in range(0, g.seqlen, TILE):
            for channel in range(start, stop, LANES):
                place = (channel - start) // LANES * block
                last = min(first + TILE, g.seqlen)
                if g.d_conv == 4:
                    convolve_four(g, b, first, last, channel, windows + place, taps + place, y)
                else:
                    convolve(g, b, first, last, channel, windows + place, taps + place, y)
        for channel in range(start, stop, LANES):
            row = 4 * (b * g.d_inner + channel) * g.d_conv
            scatter(final_state + row, windows + (channel - start) // LANES * block, g.d_conv)


@Kernel
def conv_update(p, thread, threads):
    """Convolve one token of every row; channel by channel, since the windows lie so in memory."""
    g = read_given(p)
    new_state, y = p[GIVEN_FIELDS], read_view(p, GIVEN_FIELDS + 1)
    values, totals = stack(VECTORS), stack(VECTORS)
    groups, row = -(-g.d_inner // GROUP), 4 * g.d_conv
    for task in range(thread, g.batch * groups, threads):
        b, start = task // groups, task % groups * GROUP
        stop = min(start + GROUP, g.d_inner)
        for channel in range(start, stop, LANES):
            store(values + 4 * (channel - start), read(g.x, b, 0, channel))
        for channel in range(start, stop):
            taps, place = g.weight + channel * row, (b * g.d_inner + channel) * row
            newest = load_float(values + 4 * (channel - start))
            total = newest * load_float(taps + row - 4)
            for i in range(0, row - 4, 4):
                older = load_float(g.initial_state + place + i + 4)
                store_float(new_state + place + i, older)
                total += older * load_float(taps + i)
            store_float(new_state + place + row - 4, newest)
            store_float(totals + 4 * (channel - start), total)
        for channel in range(start, stop, LANES):
            total = load(totals + 4 * (channel - start))
            if g.bias.address != 0:
                total = total + read(g.bias, 0, 0, channel)
            write(y, b, 0, channel, total * sigmoid(total) if g.silu else total)


class Found(NamedTuple):
    """The gradients as the backward kernel sees them; addresses are of contiguous float32."""

    y: View  # gradient of the output, an input
    final_state: int  # gradient of the final state, an input; 0 if absent
    weight: int  # (batch, d_inner, d_conv)
    bias: int  # (batch, d_inner)
    initial_state: int  # (batch, d_inner, d_conv)
    x: View


@njit
def read_found(p):
    """Return the gradients, which follow the inputs among the backward kernel's arguments."""
    first = GIVEN_FIELDS + VIEW_FIELDS
    return Found(
        read_view(p, GIVEN_FIELDS), p[first], p[first + 1], p[first + 2], p[first + 3], read_view(p, first + 4)
    )


@njit
def find_sums(g, d, b, first, last, channel, taps, window, d_taps, d_bias, d_sums):
    """Go forwards: store the gradients of the tokens' sums and add up those of taps and bias."""
    d_shift = load(d_bias)
    for t in range(first, last):
        if is_padding(g.seq_idx, b * g.seqlen + t):
            continue
        total = slide(g, b, t, channel, window, taps)
        d_total = read(d.y, b, t, channel)
        if g.silu:
            s = sigmoid(total)
            d_total = d_total * (s * (total * (splat(1.0) - s) + ONE))
        store(d_sums + t * GROUP * 4, d_total)
        d_shift = d_shift + d_total
        for i in range(0, g.d_conv * VECTOR, VECTOR):
            store(d_taps + i, load(d_taps + i) + d_total * load(window + i))
    store(d_bias, d_shift)


@njit
def find_inputs(g, d, b, first, last, channel, taps, d_window, d_sums):
    """Go backwards: carry the window's gradient and write that of each input as it leaves the window."""
    newest = (g.d_conv - 1) * VECTOR
    for t in range(last - 1, first - 1, -1):
        token = b * g.seqlen + t
        if is_padding(g.seq_idx, token):
            write(d.x, b, t, channel, splat(0.0))
            continue
        d_total = load(d_sums + t * GROUP * 4)
        write(d.x, b, t, channel, load(d_window + newest) + d_total * load(taps + newest))
        for i in range(newest, 0, -VECTOR):
            store(d_window + i, load(d_window + i - VECTOR) + d_total * load(taps + i - VECTOR))
        store(d_window, splat(0.0))
        if restarts(g.seq_idx, token, t):
            clear(d_window, g.d_conv)


@Kernel
def conv_backward(p, thread, threads):
    """Find the gradients of every (row, group of channels)."""
    g, d = read_given(p), read_found(p)
    block = g.d_conv * VECTOR
    taps = g.scratch + thread * (4 * VECTORS * block + VECTORS * VECTOR + g.seqlen * GROUP * 4)
    windows, d_windows, d_taps = taps + VECTORS * block, taps + 2 * VECTORS * block, taps + 3 * VECTORS * block
    d_bias = taps + 4 * VECTORS * block
    d_sums = d_bias + VECTORS * VECTOR
    groups = -(-g.d_inner // GROUP)
    for task in range(thread, g.batch * groups, threads):
        b, start = task // groups, task % groups * GROUP
        stop = min(start + GROUP, g.d_inner)
        begin(g, b, start, stop, taps, windows)
        clear(d_taps, VECTORS * g.d_conv)
        clear(d_bias, VECTORS)
        for first in range(0, g.seqlen, TILE):
            for channel in range(start, stop, LANES):
                i = (channel - start) // LANES
                find_sums(
                    g, d, b, first, min(first + TILE, g.seqlen), channel, taps + i * block, windows + i * block,
                    d_taps + i * block, d_bias + i * VECTOR, d_sums + i * VECTOR,
                )  # fmt: skip
        for channel in range(start, stop, LANES):
            i = (channel - start) // LANES
            row = 4 * (b * g.d_inner + channel)
            gather(d_windows + i * block, d.final_state + row * g.d_conv if d.final_state else 0, g.d_conv, ONE)
            scatter(d.weight + row * g.d_conv, d_taps + i * block, g.d_conv)
            store(d.bias + row, load(d_bias + i * VECTOR))
        for first in range((g.seqlen - 1) // TILE * TILE, -1, -TILE):
            for channel in range(start, stop, LANES):
                i = (channel - start) // LANES
                last = min(first + TILE, g.seqlen)
                find_inputs(g, d, b, first, last, channel, taps + i * block, d_windows + i * block, d_sums + i * VECTOR)
        for channel in range(start, stop, LANES):
            row = 4 * (b * g.d_inner + channel) * g.d_conv
            scatter(d.initial_state + row, d_windows + (channel - start) // LANES * block, g.d_conv)
