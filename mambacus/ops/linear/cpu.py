"""Matrix products with few rows on a CPU: reading the weights is the work, so each is read once, in its own dtype.

Torch's own products reach a half of the memory's speed for one row and a tenth for sixteen rows or bfloat16.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from mambacus.ops.rows import floats, new
from mambacus.ops.simd import LANES, VECTOR, load, load_bfloat16, prefetch, splat, store_float, total
from mambacus.ops.threads import Kernel, thread_count

OUTPUTS = 48  # outputs of one task; a multiple of the three that a tile computes
AHEAD = 2048  # bytes from the weights being read to those asked for
NANOSECONDS_PER_WEIGHT = 0.25  # of one thread
NANOSECONDS_PER_PRODUCT = 0.03


@njit
def read_weights(row, k, half):
    """Return the weights k ... k + LANES of the row at an address, as float32."""
    if half:
        return load_bfloat16(row + 2 * k)
    return load(row + 4 * k)


@njit
def dot(x, weight, length, half):
    """Return the product of one row of x and one row of weights; four sums keep the pipelines busy."""
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    fours = length - length % (4 * LANES)
    for k in range(0, fours, 4 * LANES):
        ahead = weight + k * (2 if half else 4) + AHEAD
        prefetch(ahead)
        prefetch(ahead + 2 * VECTOR)
        a = a + load(x + 4 * k) * read_weights(weight, k, half)
        b = b + load(x + 4 * k + VECTOR) * read_weights(weight, k + LANES, half)
        c = c + load(x + 4 * k + 2 * VECTOR) * read_weights(weight, k + 2 * LANES, half)
        d = d + load(x + 4 * k + 3 * VECTOR) * read_weights(weight, k + 3 * LANES, half)
    for k in range(fours, length, LANES):
        a = a + load(x + 4 * k) * read_weights(weight, k, half)
    return total((a + b) + (c + d))


@njit
def store_three(address, a, b, c):
    """Write the totals of three vectors side by side."""
    store_float(address, total(a))
    store_float(address + 4, total(b))
    store_float(address + 8, total(c))


@njit
def tile(x, x_row, weight, weight_row, length, half, y, y_row, ahead, stride):
    """Compute four rows times three outputs: the twelve sums and what they need fill the sixteen vector registers.

    Meanwhile ask for the memory from ``ahead`` on, ``stride`` bytes for each vector of the length.
    """
    a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = splat(0.0)
    for k in range(0, length, LANES):
        prefetch(ahead)
        prefetch(ahead + stride // 2)
        ahead += stride
        w0 = read_weights(weight, k, half)
        w1 = read_weights(weight + weight_row, k, half)
        w2 = read_weights(weight + 2 * weight_row, k, half)
        v = load(x + 4 * k)
        a0, a1, a2 = a0 + v * w0, a1 + v * w1, a2 + v * w2
        v = load(x + x_row + 4 * k)
        b0, b1, b2 = b0 + v * w0, b1 + v * w1, b2 + v * w2
        v = load(x + 2 * x_row + 4 * k)
        c0, c1, c2 = c0 + v * w0, c1 + v * w1, c2 + v * w2
        v = load(x + 3 * x_row + 4 * k)
        d0, d1, d2 = d0 + v * w0, d1 + v * w1, d2 + v * w2
    store_three(y, a0, a1, a2)
    store_three(y + y_row, b0, b1, b2)
    store_three(y + 2 * y_row, c0, c1, c2)
    store_three(y + 3 * y_row, d0, d1, d2)


@njit
def compute_outputs(p, first, last, half):
    """Compute the outputs [first, last) of every row."""
    rows, outputs, length, x, weight, y = p[0], p[1], p[2], p[3], p[4], p[5]
    weight_row, x_row, y_row = length * (2 if half else 4), length * 4, outputs * 4
    tiled_rows = rows - rows % 4
    tiled_last = first + (last - first) // 3 * 3 if tiled_rows else first
    tiles = max(1, tiled_rows // 4)
    stride = -(-3 * LANES * (2 if half else 4) // tiles)  # the tiles share the work of asking for the next weights
    for n in range(first, tiled_last, 3):
        w = weight + n * weight_row
        for i in range(tiled_rows // 4):
            ahead = w + 3 * weight_row + i * stride * (length // LANES)
            place = y + 4 * i * y_row + 4 * n
            tile(x + 4 * i * x_row, x_row, w, weight_row, length, half, place, y_row, ahead, stride)
        for m in range(tiled_rows, rows):
            for i in range(3):
                store_float(y + m * y_row + 4 * (n + i), dot(x + m * x_row, w + i * weight_row, length, half))
    for n in range(tiled_last, last):
        for m in range(rows):
            store_float(y + m * y_row + 4 * n, dot(x + m * x_row, weight + n * weight_row, length, half))


@Kernel
def few_rows_kernel(p, thread, threads):
    """Compute the tasks of this thread; the dtype is settled outside the loops."""
    outputs, half = p[1], p[6]
    tasks = -(-outputs // OUTPUTS)
    for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):  # neighbours: one stream of memory
        first, last = task * OUTPUTS, min((task + 1) * OUTPUTS, outputs)
        if half:
            compute_outputs(p, first, last, True)
        else:
            compute_outputs(p, first, last, False)


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` in float32.

    Args:
        x: (..., in_features), float32 or bfloat16; in_features is a multiple of `LANES`.
        weight: (out_features, in_features), contiguous float32 or bfloat16.
    """
    x = floats(x)
    outputs, length = weight.shape
    rows = x.numel() // length
    y = new(*x.shape[:-1], outputs)
    cost = outputs * length * max(NANOSECONDS_PER_WEIGHT, NANOSECONDS_PER_PRODUCT * rows)
    half = int(weight.dtype == torch.bfloat16)
    arguments = (rows, outputs, length, x.data_ptr(), weight.data_ptr(), y.data_ptr(), half)
    few_rows_kernel(arguments, thread_count(-(-outputs // OUTPUTS), cost))
    return y
