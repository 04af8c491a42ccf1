"""Products with quantised weights on a CPU: each weight is read once, unpacked in registers, multiplied as an integer.

Inputs become integers of 16 bits with one scale a row, so that their rounding is far below that of the weights.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mambacus.ops.integer_simd import (
    add_ints,
    first_scale,
    half_to_floats,
    load_scales,
    load_words,
    multiply_pairs,
    second_scale,
    store_rounded,
    to_floats,
    top_bits,
)
from mambacus.ops.linear.streams import STREAMS, ask_ahead, share
from mambacus.ops.quantised_linear.packing import BLOCK_BYTES, WORDS, Packed
from mambacus.ops.rows import new, read_numbers, write_number
from mambacus.ops.simd import (
    LANES,
    VECTOR,
    absolute,
    greatest,
    load_float,
    load_int64,
    prefetch,
    splat,
    store,
    store_float,
    total,
    where_negative,
)
from mambacus.ops.threads import Kernel, thread_count

AHEAD = 2048  # bytes from the weights being read to those asked for
TILE = 4  # rows of x for which weights are unpacked once
NANOSECONDS_PER_BYTE = 0.08  # of one thread, to read weights
NANOSECONDS_PER_PRODUCT = 0.02
NANOSECONDS_PER_WEIGHT = 0.1  # to unpack
HALVES = WORDS // (2 * LANES)  # vectors in a block
PLANE = 2 * WORDS  # bytes of the inputs that belong to one plane of a block
LARGEST = np.float32(16383.0)  # of the rounded inputs: sums of products stay below 2**31
LEAST = np.float32(1e-30)  # rows whose inputs are all smaller count as zeros


@njit
def round_row(x, target, length, padded, half):
    """Write a row of float32 or (``half``) bfloat16 as integers of 16 bits, zeros after it.

    Returns:
        What a one of them stands for; NaN if there is NaN or infinity in the row.
    """
    largest, odd = splat(0.0), splat(0.0)
    for k in range(0, length, LANES):
        value = read_numbers(x, k, half)
        odd = odd + value * np.float32(0.0)
        size = absolute(value)
        largest = where_negative(largest - size, size, largest)
    most = greatest(largest)
    inverse = LARGEST / most if most > LEAST else np.float32(0.0)
    for k in range(0, length, LANES):
        store_rounded(target + 2 * k, read_numbers(x, k, half) * inverse)
    for k in range(length, padded, LANES):
        store_rounded(target + 2 * k, splat(0.0))
    return most / LARGEST + total(odd)


@njit
def one_plane(w, x):
    """Return the products of a plane of weights and its inputs, summed in pairs, as float32."""
    return to_floats(multiply_pairs(w, load_words(x)))


@njit
def two_planes(v, w, x):
    """Return the sums over two planes of weights and their inputs as float32; both have the same scale."""
    return to_floats(add_ints(multiply_pairs(v, load_words(x)), multiply_pairs(w, load_words(x + PLANE))))


@njit
def add_block8(a, x, codes, scales):
    """Return ``a`` and the products of one block of int8 weights and its inputs."""
    scale = first_scale(load_scales(scales))
    for half in range(HALVES):  # apart: their sum could be too large for 32 bits
        w = load_words(codes + half * VECTOR)
        a = a + two_planes(top_bits(w, 0, 8), top_bits(w, 8, 8), x + half * VECTOR) * scale
    return a


@njit
def add_block4(a, x, codes, scales):
    """Return ``a`` and the products of one block of int4 weights and its inputs."""
    for pair in range(2):  # of planes
        both = load_scales(scales + 4 * pair)
        for half in range(HALVES):
            w = load_words(codes + half * VECTOR)
            v, w = (top_bits(w, 0, 4), top_bits(w, 4, 4)) if pair == 0 else (top_bits(w, 8, 4), top_bits(w, 12, 4))
            place = x + 2 * pair * PLANE + half * VECTOR
            a = a + one_plane(v, place) * first_scale(both)
            a = a + one_plane(w, place + PLANE) * second_scale(both)
    return a


@njit
def add_block(a, x, codes, scales, eight):
    """Return ``a`` and the products of one block of weights and its inputs."""
    return add_block8(a, x, codes, scales) if eight else add_block4(a, x, codes, scales)


@njit
def dot(x, codes, scales, blocks, eight):
    """Return the product of one rounded row of x and one row of weights."""
    a = splat(0.0)
    for _ in range(blocks):
        prefetch(codes + AHEAD)
        a = add_block(a, x, codes, scales, eight)
        codes += BLOCK_BYTES
        scales += 2 if eight else 8
        x += (2 if eight else 4) * PLANE
    return total(a)


@njit
def dot_streams(x, codes, scales, apart, blocks, eight):
    """Return what `dot` does for `STREAMS` rows of weights, ``apart`` rows from one another."""
    a = b = c = d = e = f = splat(0.0)
    row, step = apart * blocks * BLOCK_BYTES, apart * blocks * (2 if eight else 8)
    for _ in range(blocks):
        ask_ahead(codes, row)
        a = add_block(a, x, codes, scales, eight)
        b = add_block(b, x, codes + row, scales + step, eight)
        c = add_block(c, x, codes + 2 * row, scales + 2 * step, eight)
        d = add_block(d, x, codes + 3 * row, scales + 3 * step, eight)
        e = add_block(e, x, codes + 4 * row, scales + 4 * step, eight)
        f = add_block(f, x, codes + 5 * row, scales + 5 * step, eight)
        codes += BLOCK_BYTES
        scales += 2 if eight else 8
        x += (2 if eight else 4) * PLANE
    return total(a), total(b), total(c), total(d), total(e), total(f)


@njit
def tile8(x, x_row, codes, scales, blocks):
    """Return what `dot` does for four rows of x and int8 weights."""
    a = b = c = d = splat(0.0)
    for block in range(blocks):
        prefetch(codes + AHEAD)
        scale = first_scale(load_scales(scales + 2 * block))
        for half in range(HALVES):
            w = load_words(codes + half * VECTOR)
            first, second = top_bits(w, 0, 8), top_bits(w, 8, 8)
            place = x + half * VECTOR
            a = a + two_planes(first, second, place) * scale
            b = b + two_planes(first, second, place + x_row) * scale
            c = c + two_planes(first, second, place + 2 * x_row) * scale
            d = d + two_planes(first, second, place + 3 * x_row) * scale
        codes += BLOCK_BYTES
        x += 2 * PLANE
    return total(a), total(b), total(c), total(d)


@njit
def tile4(x, x_row, codes, scales, blocks):
    """Return what `dot` does for four rows of x and int4 weights."""
    a = b = c = d = splat(0.0)
    for _ in range(blocks):
        prefetch(codes + AHEAD)
        for pair in range(2):  # of planes
            both = load_scales(scales + 4 * pair)
            first, second = first_scale(both), second_scale(both)
            for half in range(HALVES):
                w = load_words(codes + half * VECTOR)
                v, w = (top_bits(w, 0, 4), top_bits(w, 4, 4)) if pair == 0 else (top_bits(w, 8, 4), top_bits(w, 12, 4))
                place = x + 2 * pair * PLANE + half * VECTOR
                a = a + one_plane(v, place) * first + one_plane(w, place + PLANE) * second
                place += x_row
                b = b + one_plane(v, place) * first + one_plane(w, place + PLANE) * second
                place += x_row
                c = c + one_plane(v, place) * first + one_plane(w, place + PLANE) * second
                place += x_row
                d = d + one_plane(v, place) * first + one_plane(w, place + PLANE) * second
        scales += 8
        codes += BLOCK_BYTES
        x += 4 * PLANE
    return total(a), total(b), total(c), total(d)


class Task(NamedTuple):
    """The arguments of the kernel: sizes, addresses of memory, and what follows from them.

    ``rounded`` holds, for each thread, the rows of x as integers of 16 bits and then what a one of each stands for.
    """

    rows: int
    outputs: int
    blocks: int  # in a row of weights
    length: int  # of a row of x
    bits: int
    x: int
    codes: int
    scales: int
    y: int
    rounded: int
    x_half: int  # 1 for bfloat16, 0 for float32
    y_half: int


@njit
def read_task(p):
    """Return the arguments at an address."""
    return Task(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11])


@njit
def compute_output(task, x, x_row, steps, n, eight):
    """Compute output ``n`` of every row from the rounded rows at ``x`` and what their numbers stand for."""
    codes = task.codes + n * task.blocks * BLOCK_BYTES
    scales = task.scales + 2 * n * task.blocks * (1 if eight else 4)
    y, half, width = task.y, task.y_half, task.outputs
    tiled = task.rows - task.rows % TILE
    for m in range(0, tiled, TILE):
        place = x + m * x_row
        if eight:
            a, b, c, d = tile8(place, x_row, codes, scales, task.blocks)
        else:
            a, b, c, d = tile4(place, x_row, codes, scales, task.blocks)
        write_number(y, m * width + n, a * load_float(steps + 4 * m), half)
        write_number(y, (m + 1) * width + n, b * load_float(steps + 4 * m + 4), half)
        write_number(y, (m + 2) * width + n, c * load_float(steps + 4 * m + 8), half)
        write_number(y, (m + 3) * width + n, d * load_float(steps + 4 * m + 12), half)
    for m in range(tiled, task.rows):
        product = dot(x + m * x_row, codes, scales, task.blocks, eight)
        write_number(y, m * width + n, product * load_float(steps + 4 * m), half)


@njit
def compute_outputs(task, x, x_row, steps, first, last, eight):
    """Compute the outputs [first, last) of every row."""
    if task.rows >= TILE:
        for n in range(first, last):
            compute_output(task, x, x_row, steps, n, eight)
        return
    each = (last - first) // STREAMS
    for n in range(first, first + each):
        codes = task.codes + n * task.blocks * BLOCK_BYTES
        scales = task.scales + n * task.blocks * (2 if eight else 8)
        for m in range(task.rows):
            products = dot_streams(x + m * x_row, codes, scales, each, task.blocks, eight)
            for i in range(STREAMS):
                value = products[i] * load_float(steps + 4 * m)
                write_number(task.y, m * task.outputs + n + i * each, value, task.y_half)
    for n in range(first + STREAMS * each, last):
        compute_output(task, x, x_row, steps, n, eight)


@Kernel
def few_rows_kernel(p, thread, threads):
    """Compute the outputs of this thread; each rounds x for itself, which is quicker than to wait for one another."""
    task = read_task(p)
    padded = task.blocks * (BLOCK_BYTES * 8 // task.bits)
    x_row = 2 * padded
    x = task.rounded + thread * task.rows * (x_row + 4)
    steps = x + task.rows * x_row
    for m in range(task.rows):
        row = task.x + (2 if task.x_half else 4) * m * task.length
        step = round_row(row, x + m * x_row, task.length, padded, task.x_half)
        store_float(steps + 4 * m, step / np.float32(1 << (16 - task.bits)))  # weights stand at the top of their words
    first, last = share(task.outputs, thread, threads)
    if task.bits == 8:
        compute_outputs(task, x, x_row, steps, first, last, True)
    else:
        compute_outputs(task, x, x_row, steps, first, last, False)


def few_rows(x: Tensor, weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``x @ weight.T``, summed in float32.

    Args:
        x: (..., in_features), float32 or bfloat16.
        weight: (out_features, in_features).
        dtype: of the result, float32 or bfloat16.
    """
    x = x.contiguous()
    missing = -x.shape[-1] % LANES
    if missing:
        x = F.pad(x, (0, missing))
    outputs, code_words = weight.codes.shape
    length = x.shape[-1]
    rows = x.numel() // length
    y = new(*x.shape[:-1], outputs, dtype=dtype)
    cost = outputs * code_words * (2 * NANOSECONDS_PER_BYTE + rows * weight.format.planes * NANOSECONDS_PER_PRODUCT)
    threads = thread_count(-(-outputs // STREAMS), cost)
    rounded = new(threads * rows * (code_words * weight.format.planes + 2), dtype=torch.int16)
    addresses = (tensor.data_ptr() for tensor in (x, weight.codes, weight.scales, y, rounded))
    halves = (int(tensor.dtype == torch.bfloat16) for tensor in (x, y))
    few_rows_kernel((rows, outputs, code_words // WORDS, length, weight.format.bits, *addresses, *halves), threads)
    return y


@njit
def write_plane(y, w, scale):
    """Write one plane of weights, which stands at the top of its words, as float32."""
    store(y, half_to_floats(w, 0) * scale)
    store(y + VECTOR, half_to_floats(w, 1) * scale)


@Kernel
def unpack_kernel(p, thread, threads):
    """Write the chosen rows of weights as float32, padding too; a number that no row has gives NaN."""
    rows, blocks, bits, outputs, chosen, codes, scales, y = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    planes = 16 // bits
    shrink = np.float32(1.0) / np.float32(1 << (16 - bits))
    for task in range(rows * thread // threads, rows * (thread + 1) // threads):
        row = load_int64(chosen + 8 * task)
        if row < 0 or row >= outputs:  # `unpack_rows` checks, but a tape that is run again does not
            for k in range(0, blocks * planes * WORDS, LANES):
                store(y + 4 * (task * blocks * planes * WORDS + k), splat(np.nan))
            continue
        for block in range(blocks):
            target = y + 4 * planes * WORDS * (task * blocks + block)
            place = codes + BLOCK_BYTES * (row * blocks + block)
            for half in range(HALVES):
                w = load_words(place + half * VECTOR)
                at = target + 2 * half * VECTOR
                if bits == 8:
                    scale = first_scale(load_scales(scales + 2 * (row * blocks + block))) * shrink
                    write_plane(at, top_bits(w, 0, 8), scale)
                    write_plane(at + 2 * PLANE, top_bits(w, 8, 8), scale)
                else:
                    pair = load_scales(scales + 8 * (row * blocks + block))
                    write_plane(at, top_bits(w, 0, 4), first_scale(pair) * shrink)
                    write_plane(at + 2 * PLANE, top_bits(w, 4, 4), second_scale(pair) * shrink)
                    pair = load_scales(scales + 8 * (row * blocks + block) + 4)
                    write_plane(at + 4 * PLANE, top_bits(w, 8, 4), first_scale(pair) * shrink)
                    write_plane(at + 6 * PLANE, top_bits(w, 12, 4), second_scale(pair) * shrink)


def unpack_rows(weight: Packed, rows: Tensor) -> Tensor:
    """Return rows of weights as float32 (n, in_features), given their numbers, (n,); equal to `unpack`'s.

    Raises:
        IndexError: there is no row of such a number.
    """
    rows = rows.to(torch.int64).contiguous()
    outputs = len(weight.codes)
    numbers = rows.numpy()  # torch's own minimum takes longer than the row, and a tape would keep it
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < outputs:
        wrong = next(number for number in numbers.tolist() if not 0 <= number < outputs)
        raise IndexError(f"index {wrong} is out of range: there are {outputs} rows")
    padded = weight.codes.shape[1] * weight.format.planes
    y = new(len(rows), padded)
    threads = thread_count(len(rows), len(rows) * padded * NANOSECONDS_PER_WEIGHT)
    addresses = (tensor.data_ptr() for tensor in (rows, weight.codes, weight.scales, y))
    unpack_kernel((len(rows), weight.codes.shape[1] // WORDS, weight.format.bits, outputs, *addresses), threads)
    return y if padded == weight.length else y[:, : weight.length]
