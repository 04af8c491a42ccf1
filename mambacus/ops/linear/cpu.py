"""Matrix products with few rows on a CPU: reading the weights is the work, so each is read once, in its own dtype.

Torch's own products reach a half of the memory's speed for one row and a tenth for sixteen rows or bfloat16.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from mambacus.ops.bfloat16_simd import multiplies_pairs
from mambacus.ops.linear.pairs import few_rows_by_pairs
from mambacus.ops.linear.streams import STREAMS, ask_ahead, share
from mambacus.ops.rows import new, read_numbers, write_number
from mambacus.ops.simd import LANES, VECTOR, load, load_bfloat16, prefetch, splat, store, total
from mambacus.ops.threads import Kernel, thread_count

PAIRED_ROWS = 4  # from here on the instruction for pairs of bfloat16 is used; fewer rows wait for memory either way
NANOSECONDS_PER_WEIGHT = 0.25  # of one thread
NANOSECONDS_PER_PRODUCT = 0.03


@njit
def dot(x, weight, length, half):
    """Return the product of one row of x and one row of weights; four sums keep the pipelines busy."""
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    fours = length - length % (4 * LANES)
    for k in range(0, fours, 4 * LANES):
        a = a + load(x + 4 * k) * read_numbers(weight, k, half)
        b = b + load(x + 4 * k + VECTOR) * read_numbers(weight, k + LANES, half)
        c = c + load(x + 4 * k + 2 * VECTOR) * read_numbers(weight, k + 2 * LANES, half)
        d = d + load(x + 4 * k + 3 * VECTOR) * read_numbers(weight, k + 3 * LANES, half)
    for k in range(fours, length, LANES):
        a = a + load(x + 4 * k) * read_numbers(weight, k, half)
    return total((a + b) + (c + d))


@njit
def dot_streams(x, weight, apart, length, half):
    """Return the products of one row of x and `STREAMS` rows of weights, ``apart`` bytes from one another."""
    a = b = c = d = e = f = splat(0.0)
    size = 2 if half else 4
    for k in range(0, length, LANES):
        w = weight + size * k
        ask_ahead(w, apart)
        v = load(x + 4 * k)
        a = a + v * read_numbers(w, 0, half)
        b = b + v * read_numbers(w + apart, 0, half)
        c = c + v * read_numbers(w + 2 * apart, 0, half)
        d = d + v * read_numbers(w + 3 * apart, 0, half)
        e = e + v * read_numbers(w + 4 * apart, 0, half)
        f = f + v * read_numbers(w + 5 * apart, 0, half)
    return total(a), total(b), total(c), total(d), total(e), total(f)


@njit
def store_three(y, place, half, a, b, c):
    """Write the totals of three vectors side by side."""
    write_number(y, place, total(a), half)
    write_number(y, place + 1, total(b), half)
    write_number(y, place + 2, total(c), half)


@njit
def tile(x, x_row, weight, weight_row, length, half, y, place, y_row, y_half, ahead, stride):
    """Compute four rows times three outputs, from ``place`` of y on.

    The twelve sums and what they need fill the sixteen vector registers. Meanwhile ask for the memory from ``ahead``
    on, ``stride`` bytes for each vector of the length.
    """
    a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = splat(0.0)
    for k in range(0, length, LANES):
        prefetch(ahead)
        prefetch(ahead + stride // 2)
        ahead += stride
        w0 = read_numbers(weight, k, half)
        w1 = read_numbers(weight + weight_row, k, half)
        w2 = read_numbers(weight + 2 * weight_row, k, half)
        v = load(x + 4 * k)
        a0, a1, a2 = a0 + v * w0, a1 + v * w1, a2 + v * w2
        v = load(x + x_row + 4 * k)
        b0, b1, b2 = b0 + v * w0, b1 + v * w1, b2 + v * w2
        v = load(x + 2 * x_row + 4 * k)
        c0, c1, c2 = c0 + v * w0, c1 + v * w1, c2 + v * w2
        v = load(x + 3 * x_row + 4 * k)
        d0, d1, d2 = d0 + v * w0, d1 + v * w1, d2 + v * w2
    store_three(y, place, y_half, a0, a1, a2)
    store_three(y, place + y_row, y_half, b0, b1, b2)
    store_three(y, place + 2 * y_row, y_half, c0, c1, c2)
    store_three(y, place + 3 * y_row, y_half, d0, d1, d2)


@njit
def compute_streams(p, x, first, last, half):
    """Compute the outputs [first, last) of the few rows of x that need no tile, float32 at an address."""
    rows, outputs, length, weight, y, y_half = p[0], p[1], p[2], p[4], p[5], p[8]
    weight_row, x_row = length * (2 if half else 4), length * 4
    each = (last - first) // STREAMS
    for n in range(first, first + each):
        for m in range(rows):
            found = dot_streams(x + m * x_row, weight + n * weight_row, each * weight_row, length, half)
            for i in range(STREAMS):
                write_number(y, m * outputs + n + i * each, found[i], y_half)
    for n in range(first + STREAMS * each, last):
        for m in range(rows):
            value = dot(x + m * x_row, weight + n * weight_row, length, half)
            write_number(y, m * outputs + n, value, y_half)


@njit
def compute_tiles(p, x, first, last, half):
    """Compute the outputs [first, last) of every row of x, four at least, float32 at an address."""
    rows, outputs, length, weight, y, y_half = p[0], p[1], p[2], p[4], p[5], p[8]
    weight_row, x_row = length * (2 if half else 4), length * 4
    tiled_rows = rows - rows % 4
    tiled_last = first + (last - first) // 3 * 3
    tiles = tiled_rows // 4
    stride = -(-3 * LANES * (2 if half else 4) // tiles)  # the tiles share the work of asking for the next weights
    for n in range(first, tiled_last, 3):
        w = weight + n * weight_row
        for i in range(tiles):
            ahead = w + 3 * weight_row + i * stride * (length // LANES)
            place = 4 * i * outputs + n
            tile(x + 4 * i * x_row, x_row, w, weight_row, length, half, y, place, outputs, y_half, ahead, stride)
        for m in range(tiled_rows, rows):
            for i in range(3):
                value = dot(x + m * x_row, w + i * weight_row, length, half)
                write_number(y, m * outputs + n + i, value, y_half)
    for n in range(tiled_last, last):
        for m in range(rows):
            value = dot(x + m * x_row, weight + n * weight_row, length, half)
            write_number(y, m * outputs + n, value, y_half)


@njit
def compute_outputs(p, x, first, last, half):
    """Compute the outputs [first, last) of every row of x, float32 at an address."""
    if p[0] < 4:
        compute_streams(p, x, first, last, half)
    else:
        compute_tiles(p, x, first, last, half)


@njit
def widened(p, thread):
    """Return the address of x in float32; each thread widens bfloat16 for itself, quicker than to wait for another."""
    numbers, x, wide = p[0] * p[2], p[3], p[9]
    if not p[7]:
        return x
    mine = wide + thread * numbers * 4
    for k in range(0, numbers, LANES):
        store(mine + 4 * k, load_bfloat16(x + 2 * k))
    return mine


@Kernel
def few_rows_kernel(p, thread, threads):
    """Compute the outputs of this thread, neighbours; the dtype is settled outside the loops."""
    outputs, half = p[1], p[6]
    x = widened(p, thread)
    first, last = share(outputs, thread, threads)
    if half:
        compute_outputs(p, x, first, last, True)
    else:
        compute_outputs(p, x, first, last, False)


def few_rows(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32, *, pairs: bool | None = None) -> Tensor:
    """Return ``x @ weight.T``, summed in float32; inputs and weights are multiplied as they are.

    Args:
        x: (..., in_features), float32 or bfloat16; in_features is a multiple of 16.
        weight: (out_features, in_features), contiguous float32 or bfloat16.
        dtype: of the result, float32 or bfloat16.
        pairs: multiply bfloat16 by the kernel for the processor's own products, or widen it to float32; None for what
            is faster.

    Numerics:
        Products are exact in both; sums are float32, in another order. The processor's own products take numbers below
        2**-126 for zeros.
    """
    x = x.contiguous()
    outputs, length = weight.shape
    rows = x.numel() // length
    y = new(*x.shape[:-1], outputs, dtype=dtype)
    cost = outputs * length * max(NANOSECONDS_PER_WEIGHT, NANOSECONDS_PER_PRODUCT * rows)
    threads = thread_count(-(-outputs // STREAMS), cost)
    if pairs is None:
        pairs = rows >= PAIRED_ROWS and x.dtype == weight.dtype == torch.bfloat16 and multiplies_pairs()
    if pairs:
        few_rows_by_pairs(x.view(rows, length), weight, y, threads)
        return y
    wide = x if x.dtype == torch.float32 else new(threads, x.numel())
    halves = (int(tensor.dtype == torch.bfloat16) for tensor in (weight, x, y))
    addresses = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    few_rows_kernel((rows, outputs, length, *addresses, *halves, wide.data_ptr()), threads)
    return y
