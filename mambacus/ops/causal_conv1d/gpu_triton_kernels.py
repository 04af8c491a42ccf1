"""Triton kernels of the causal convolution; `gpu_triton.py` launches them.

A *tap* of token t is the input j tokens before it, j = 0 .. d_conv - 1. Walking back from t, a tap lies in the row as
long as the tokens passed belong to the document of t; where the row's first real token has been passed, the taps come
from the initial state, its newest column first; beyond a restart they are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def token_ids(seq, batch, rows, seqlen, HAS_SEQ: tl.constexpr):
    """Document ids of tokens, negative for padding and outside the row."""
    there = (rows >= 0) & (rows < seqlen)
    if HAS_SEQ:
        return tl.load(seq + batch * seqlen + rows, mask=there, other=-1)
    return tl.where(there, 0, -1)


@triton.jit
def load_tap(
    x, state, seq, batch, rows, d, d_ok, seqlen, d_inner, stride_batch, stride_token, ids, in_row, in_state, depth,
    j: tl.constexpr, WIDTH: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Tap j of each row in float32, and the walk one step further.

    ``ids`` are the ids at tap j - 1, ``in_row`` and ``in_state`` say where that tap lay, ``depth`` how deep in the
    state.
    """
    here = token_ids(seq, batch, rows - j, seqlen, HAS_SEQ)
    if j == 0:
        in_row = in_row & (here >= 0)
    else:
        in_state = in_state | (in_row & (here < 0))
        in_row = in_row & (here >= 0) & (here == ids)
        depth += in_state.to(tl.int32)
    at = x + batch * stride_batch + (rows - j).to(tl.int64)[:, None] * stride_token + d[None, :]
    tap = tl.load(at, mask=in_row[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    if HAS_STATE:
        at = state + (batch * d_inner + d[None, :]) * WIDTH + (WIDTH - depth)[:, None]
        tap += tl.load(at, mask=in_state[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    return tap, here, in_row, in_state, depth


@triton.jit
def conv_forward(
    x, weight, bias, seq, state, y, final, seqlen, d_inner, stride_batch, stride_token,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs of TILE tokens; the program that meets the row's last real token also writes the final state."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    d_ok = d < d_inner
    ids = token_ids(seq, batch, rows, seqlen, HAS_SEQ)
    real = ids >= 0
    last = real & (token_ids(seq, batch, rows + 1, seqlen, HAS_SEQ) < 0)
    in_row = real
    in_state = rows < 0
    depth = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(WIDTH):
        tap, ids, in_row, in_state, depth = load_tap(
            x, state, seq, batch, rows, d, d_ok, seqlen, d_inner, stride_batch, stride_token, ids, in_row, in_state,
            depth, j, WIDTH, HAS_SEQ, HAS_STATE,
        )  # fmt: skip
        w = tl.load(weight + d * WIDTH + (WIDTH - 1 - j), mask=d_ok, other=0.0).to(tl.float32)
        total += w[None, :] * tap
        at = final + (batch * d_inner + d[None, :]) * WIDTH + (WIDTH - 1 - j) + rows[:, None] * 0
        tl.store(at, tap.to(final.dtype.element_ty), mask=last[:, None] & d_ok[None, :])
    if SILU:
        total *= sigmoid(total)
    total = tl.where(real[:, None], total, 0.0)
    at = y + (batch * seqlen + rows[:, None]) * d_inner + d[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(rows < seqlen)[:, None] & d_ok[None, :])


@triton.jit
def sum_gradient(
    grad_y, x, weight, bias, seq, state, batch, rows, d, d_ok, seqlen, d_inner, sgb, sgt, sxb, sxt,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to the sum before silu at some tokens, 0 for those that are not real."""
    ids = token_ids(seq, batch, rows, seqlen, HAS_SEQ)
    real = ids >= 0
    at = grad_y + batch * sgb + rows.to(tl.int64)[:, None] * sgt + d[None, :]
    grad = tl.load(at, mask=real[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    if SILU:
        in_row = real
        in_state = rows < -WIDTH
        depth = tl.zeros([TILE], tl.int32)
        total = tl.zeros([TILE, BLOCK], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(WIDTH):
            tap, ids, in_row, in_state, depth = load_tap(
                x, state, seq, batch, rows, d, d_ok, seqlen, d_inner, sxb, sxt, ids, in_row, in_state, depth, j,
                WIDTH, HAS_SEQ, HAS_STATE,
            )  # fmt: skip
            w = tl.load(weight + d * WIDTH + (WIDTH - 1 - j), mask=d_ok, other=0.0).to(tl.float32)
            total += w[None, :] * tap
        s = sigmoid(total)
        grad *= s * (1.0 + total * (1.0 - s))
    return grad


@triton.jit
def input_gradient(
    grad_y, grad_final, x, weight, bias, seq, state, batch, rows, first, d, d_ok, seqlen, d_inner, sgb, sgt, sxb, sxt,
    HAS_FINAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the inputs at ``rows``; those before the first real token ``first`` stand for the initial state."""
    before = token_ids(seq, batch, rows, seqlen, HAS_SEQ)
    alive = (before >= 0) | ((rows < first) & (rows >= first - WIDTH))
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for j in tl.static_range(WIDTH):
        reader = rows + j  # the token whose tap j is this input
        ids = token_ids(seq, batch, reader, seqlen, HAS_SEQ)
        if j > 0:
            alive = alive & ((reader <= first) | ((ids >= 0) & (ids == before)))
        grad = sum_gradient(
            grad_y, x, weight, bias, seq, state, batch, tl.where(alive, reader, -1), d, d_ok, seqlen, d_inner, sgb, sgt,
            sxb, sxt, HAS_BIAS, HAS_SEQ, HAS_STATE, SILU, WIDTH, TILE, BLOCK,
        )  # fmt: skip
        w = tl.load(weight + d * WIDTH + (WIDTH - 1 - j), mask=d_ok, other=0.0).to(tl.float32)
        total += w[None, :] * grad
        if HAS_FINAL:
            last = alive & (ids >= 0) & (token_ids(seq, batch, reader + 1, seqlen, HAS_SEQ) < 0)
            at = grad_final + (batch * d_inner + d[None, :]) * WIDTH + (WIDTH - 1 - j) + rows[:, None] * 0
            total += tl.load(at, mask=last[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
        before = ids
    return total


@triton.jit
def conv_backward(
    grad_y, grad_final, x, weight, bias, seq, state, first_real, grad_x, grad_weight, grad_bias,
    seqlen, d_inner, run, n_runs, sgb, sgt, sxb, sxt,
    HAS_FINAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of ``run`` tokens; grad_weight (batch, run, WIDTH, d), grad_bias (batch, run, d) are partial sums."""
    part = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    d_ok = d < d_inner
    first = tl.load(first_real + batch) if HAS_SEQ else 0
    sums = grad_weight + (batch * n_runs + part) * WIDTH * d_inner + d
    sum_bias = tl.zeros([BLOCK], tl.float32)
    begin = part * run
    for start in range(begin, tl.minimum(begin + run, seqlen), TILE):
        rows = start + tl.arange(0, TILE)
        total = input_gradient(
            grad_y, grad_final, x, weight, bias, seq, state, batch, rows, first, d, d_ok, seqlen, d_inner, sgb, sgt,
            sxb, sxt, HAS_FINAL, HAS_BIAS, HAS_SEQ, HAS_STATE, SILU, WIDTH, TILE, BLOCK,
        )  # fmt: skip
        ids = token_ids(seq, batch, rows, seqlen, HAS_SEQ)
        real = ids >= 0
        total = tl.where(real[:, None], total, 0.0)
        at = grad_x + (batch * seqlen + rows[:, None]) * d_inner + d[None, :]
        tl.store(at, total.to(grad_x.dtype.element_ty), mask=(rows < seqlen)[:, None] & d_ok[None, :])

        grad = sum_gradient(
            grad_y, x, weight, bias, seq, state, batch, rows, d, d_ok, seqlen, d_inner, sgb, sgt, sxb, sxt,
            HAS_BIAS, HAS_SEQ, HAS_STATE, SILU, WIDTH, TILE, BLOCK,
        )  # fmt: skip
        sum_bias += tl.sum(grad, axis=0)
        in_row = real
        in_state = rows < 0
        depth = tl.zeros([TILE], tl.int32)
        for j in tl.static_range(WIDTH):
            tap, ids, in_row, in_state, depth = load_tap(
                x, state, seq, batch, rows, d, d_ok, seqlen, d_inner, sxb, sxt, ids, in_row, in_state, depth, j,
                WIDTH, HAS_SEQ, HAS_STATE,
            )  # fmt: skip
            at = sums + (WIDTH - 1 - j) * d_inner
            old = tl.load(at, mask=d_ok, other=0.0)
            tl.store(at, old + tl.sum(grad * tap, axis=0), mask=d_ok)
        tl.debug_barrier()  # the next tile adds to these sums
    tl.store(grad_bias + (batch * n_runs + part) * d_inner + d, sum_bias, mask=d_ok)


@triton.jit
def conv_backward_state(
    grad_y, grad_final, x, weight, bias, seq, state, first_real, grad_state, seqlen, d_inner, sgb, sgt, sxb, sxt,
    HAS_FINAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial state (batch, d, WIDTH): of the WIDTH inputs before the first real token."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    d_ok = d < d_inner
    first = tl.load(first_real + batch) if HAS_SEQ else 0
    column = tl.arange(0, TILE)
    rows = tl.where(column < WIDTH, first - WIDTH + column, -2 * WIDTH)
    total = input_gradient(
        grad_y, grad_final, x, weight, bias, seq, state, batch, rows, first, d, d_ok, seqlen, d_inner, sgb, sgt,
        sxb, sxt, HAS_FINAL, HAS_BIAS, HAS_SEQ, True, SILU, WIDTH, TILE, BLOCK,
    )  # fmt: skip
    at = (batch * d_inner + d[None, :]) * WIDTH + column[:, None]
    mask = (column < WIDTH)[:, None] & d_ok[None, :]
    if HAS_FINAL and HAS_SEQ:  # a row of padding alone hands its initial state on
        padding = ((first + column * 0) == seqlen)[:, None]
        passed = tl.load(grad_final + at, mask=mask & padding, other=0.0).to(tl.float32)
        total = tl.where(padding, passed, total)
    tl.store(grad_state + at, total.to(grad_state.dtype.element_ty), mask=mask)


@triton.jit
def conv_update(
    x, state, weight, bias, y, new_state, d_inner, stride_batch, ssb, ssd, ssw,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: move the window on by one and sum it."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    d_ok = d < d_inner
    out = new_state + (batch * d_inner + d) * WIDTH
    newest = tl.load(x + batch * stride_batch + d, mask=d_ok, other=0.0).to(tl.float32)
    total = newest * tl.load(weight + d * WIDTH + WIDTH - 1, mask=d_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        tap = tl.load(state + batch * ssb + d * ssd + (k + 1) * ssw, mask=d_ok, other=0.0)
        tap = tap.to(new_state.dtype.element_ty)
        tl.store(out + k, tap, mask=d_ok)
        total += tap.to(tl.float32) * tl.load(weight + d * WIDTH + k, mask=d_ok, other=0.0).to(tl.float32)
    tl.store(out + WIDTH - 1, newest.to(new_state.dtype.element_ty), mask=d_ok)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + batch * d_inner + d, total.to(y.dtype.element_ty), mask=d_ok)
