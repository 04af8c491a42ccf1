"""Products of bfloat16 by the processor's own instruction, up to `LANES` rows of inputs side by side in a vector.

A lane belongs to a row: a vector of inputs meets a pair of weights repeated in all lanes, so no sum crosses lanes. With
fewer rows a lane belongs to a row and one of ``phases`` pairs: half the rows, half the instructions.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from mambacus.ops.bfloat16_simd import (
    add_lanes,
    add_products,
    copy_bfloat16,
    copy_pairs,
    load_pairs,
    repeat_pairs,
)
from mambacus.ops.linear.streams import STREAMS, ask_ahead, share
from mambacus.ops.rows import new
from mambacus.ops.simd import LANES, VECTOR, load_float, splat, stack, store, store_bfloat16, store_float
from mambacus.ops.threads import Kernel

BLOCK = 32  # bytes of a row of weights between two looks ahead; rows are whole blocks


def _for_phases(phases):
    """Return the functions that arrange a group of rows and multiply it, for 1, 2 or 4 phases."""

    @njit
    def arrange(x, x_row, rows, length, target):
        """Write the pairs of the rows as they meet the weights; a missing row is the last one again."""
        for k in range(0, length, 2 * phases):
            for row in range(LANES // phases):
                copy_pairs(x + min(row, rows - 1) * x_row + 2 * k, target, phases)
                target += 4 * phases

    @njit
    def summed(a, b):
        """Return the sums of the rows, at every ``phases``-th lane."""
        value = a + b
        if phases > 1:
            value = add_lanes(value, 1)
        if phases > 2:
            value = add_lanes(value, 2)
        return value

    @njit
    def multiply(x, weight, apart, length):
        """Return the products of the arranged rows and `STREAMS` rows of weights, ``apart`` bytes from one another."""
        a = b = c = d = e = f = splat(0.0)
        g = h = i = j = k = m = splat(0.0)  # two sums for each output: an instruction waits for the one before
        for _ in range(0, 2 * length, BLOCK):
            ask_ahead(weight, apart)
            for _ in range(0, BLOCK, 8 * phases):
                v = load_pairs(x)
                a = add_products(a, v, repeat_pairs(weight, phases))
                b = add_products(b, v, repeat_pairs(weight + apart, phases))
                c = add_products(c, v, repeat_pairs(weight + 2 * apart, phases))
                d = add_products(d, v, repeat_pairs(weight + 3 * apart, phases))
                e = add_products(e, v, repeat_pairs(weight + 4 * apart, phases))
                f = add_products(f, v, repeat_pairs(weight + 5 * apart, phases))
                v, next_pair = load_pairs(x + VECTOR), weight + 4 * phases
                g = add_products(g, v, repeat_pairs(next_pair, phases))
                h = add_products(h, v, repeat_pairs(next_pair + apart, phases))
                i = add_products(i, v, repeat_pairs(next_pair + 2 * apart, phases))
                j = add_products(j, v, repeat_pairs(next_pair + 3 * apart, phases))
                k = add_products(k, v, repeat_pairs(next_pair + 4 * apart, phases))
                m = add_products(m, v, repeat_pairs(next_pair + 5 * apart, phases))
                x += 2 * VECTOR
                weight += 8 * phases
        return summed(a, g), summed(b, h), summed(c, i), summed(d, j), summed(e, k), summed(f, m)

    return arrange, multiply


_arrange1, _multiply1 = _for_phases(1)
_arrange2, _multiply2 = _for_phases(2)
_arrange4, _multiply4 = _for_phases(4)


@njit
def phases_for(rows):
    """Return how many pairs of a row one vector holds when it holds all ``rows``, `LANES` at most."""
    if 4 * rows <= LANES:
        return 4
    return 2 if 2 * rows <= LANES else 1


@njit
def arrange(x, x_row, rows, length, target):
    """Write a group of rows as `multiply` reads it."""
    phases = phases_for(rows)
    if phases == 4:
        _arrange4(x, x_row, rows, length, target)
    elif phases == 2:
        _arrange2(x, x_row, rows, length, target)
    else:
        _arrange1(x, x_row, rows, length, target)


@njit
def multiply(x, weight, apart, length, rows):
    """Return the products of a group of rows and `STREAMS` rows of weights, a row at every ``phases``-th lane."""
    phases = phases_for(rows)
    if phases == 4:
        return _multiply4(x, weight, apart, length)
    if phases == 2:
        return _multiply2(x, weight, apart, length)
    return _multiply1(x, weight, apart, length)


@njit
def write_rows(y, outputs, half, value, rows):
    """Write an output of a group of rows, ``outputs`` numbers from one another."""
    room = stack(1)
    phases = phases_for(rows)
    if half:
        store_bfloat16(room, value)
        for row in range(rows):
            copy_bfloat16(room + 2 * phases * row, y + 2 * outputs * row)
    else:
        store(room, value)
        for row in range(rows):
            store_float(y + 4 * outputs * row, load_float(room + 4 * phases * row))


@Kernel
def pairs_kernel(p, thread, threads):
    """Compute the outputs of this thread; each arranges x for itself, which is quicker than to wait for another."""
    rows, outputs, length, x, weight, y, half, arranged = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    groups, row, size = -(-rows // LANES), 2 * length, 2 if half else 4
    group_bytes = length // 2 * VECTOR
    mine = arranged + thread * groups * group_bytes
    for group in range(groups):
        first_row = group * LANES
        arrange(x + first_row * row, row, min(LANES, rows - first_row), length, mine + group * group_bytes)
    first, last = share(outputs, thread, threads)
    each = (last - first) // STREAMS
    rest = last - first - STREAMS * each
    for step in range(each + rest):
        alone = step >= each  # an output that is left over: all streams are its own, one result is written
        n = first + step + ((STREAMS - 1) * each if alone else 0)
        apart = 0 if alone else each * row
        for group in range(groups):
            first_row = group * LANES
            count = min(LANES, rows - first_row)
            found = multiply(mine + group * group_bytes, weight + n * row, apart, length, count)
            place = y + size * (first_row * outputs + n)
            for i in range(1 if alone else STREAMS):
                write_rows(place + size * i * each, outputs, half, found[i], count)


def few_rows_by_pairs(x: Tensor, weight: Tensor, y: Tensor, threads: int) -> None:
    """Write ``x @ weight.T``, summed in float32, to ``y``.

    Args:
        x: (rows, in_features), contiguous bfloat16; in_features is a multiple of 16.
        weight: (out_features, in_features), contiguous bfloat16.
        y: (rows, out_features), contiguous float32 or bfloat16.
        threads: among which the outputs are shared.
    """
    rows, length = x.shape
    arranged = new(threads, -(-rows // LANES), length // 2, LANES)
    sizes, half = (rows, len(weight), length), int(y.dtype == torch.bfloat16)
    pairs_kernel((*sizes, x.data_ptr(), weight.data_ptr(), y.data_ptr(), half, arranged.data_ptr()), threads)
