"""Triton kernels of the selective scan; `gpu_triton.py` launches them.

Terms: a *tile* is ``TILE`` tokens x ``BLOCK`` channels, held in registers; a *chunk* is the run of tokens between two
saved states; a *segment* is the run of tokens one program walks through. Tensors private to the kernels keep states as
(..., d_state, d_inner), so that neighbouring threads touch neighbouring channels.

Every kernel loops over the states n of a tile. For one n the tile's decays and drives are (TILE, BLOCK) matrices,
scanned along the tokens; the state enters at the tile's first row and leaves at its last one through memory that only
this program touches. Padding and rows past the end have step 0: they decay by 1 and drive by 0, so a state passes
through. A restart adds `RESTART` to the exponent of the decay, which makes the decay 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
RESTART = tl.constexpr(-1e30)


if triton.knobs.runtime.interpret or torch.version.cuda is None:

    @triton.jit
    def exp2(x):
        """2^x."""
        return tl.exp2(x)

    @triton.jit
    def reciprocal(x):
        """1 / x."""
        return 1.0 / x

else:  # one instruction each, where Triton's own treat denormals with three more

    @triton.jit
    def exp2(x):
        """2^x; results below 1e-38 become 0."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def reciprocal(x):
        """1 / x to one unit in the last place; results below 1e-38 become 0."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def decay_of(exponent, PRECISE: tl.constexpr):
    """2^exponent; with ``PRECISE`` by a polynomial where it is near 1, relative error 6e-8.

    A state that decays slowly is multiplied by hundreds of decays, and the errors of a GPU's exponential (2e-7 each)
    add up in it: in the gradient of A to 2e-6 after 150 tokens.
    """
    decay = exp2(exponent)
    if PRECISE:
        series = 0.0013347864151000977 * exponent + 0.009630169719457626
        series = series * exponent + 0.055504076182842255
        series = series * exponent + 0.24022631347179413
        series = series * exponent + 0.6931471824645996
        decay = tl.where(tl.abs(exponent) < 0.25, series * exponent + 1.0, decay)
    return decay


@triton.jit
def channels(block, BLOCK: tl.constexpr):
    """Channels of a program, ``BLOCK / 32`` adjacent ones a thread.

    Were more declared contiguous, the compiler would give a thread more channels and spread the tokens of a tile over
    the threads of the warp; so each thread holds all tokens of its channels, and scans along them touch its registers
    alone.
    """
    return tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK), BLOCK // 32 if BLOCK >= 32 else 1)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for every x, relative error 1e-7: artanh by a Chebyshev fit of error 4e-9 to its series."""
    e = exp2(-tl.abs(x) * LOG2_E)
    s = e * reciprocal(2.0 + e)  # log(1 + e) = 2 artanh(s), 0 <= s <= 1/3
    t = s * s
    series = 0.14087328635 * t + 0.13980709417
    series = series * t + 0.20012426862
    series = series * t + 0.33333157968
    series = series * t + 1.0
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(-x * LOG2_E))


# The two scans are written out row by row. With all tokens of a channel in one thread, to choose a row costs nothing
# (it is picked in integers, since the compiler may drop the addition of an integer 0), and what remains is the bare
# recurrence. Triton's associative_scan gives the same code forwards, but backwards it moves every value through the
# other threads.


@triton.jit
def scan_states(decay, value, h, TILE: tl.constexpr):
    """States of a tile, ``h = decay_t h + value_t``, and the last one."""
    decay_bits = decay.to(tl.int32, bitcast=True)
    value_bits = value.to(tl.int32, bitcast=True)
    for row in tl.static_range(TILE):
        at = (tl.arange(0, TILE) == row)[:, None]
        row_decay = tl.sum(tl.where(at, decay_bits, 0), axis=0).to(tl.float32, bitcast=True)
        h = row_decay * h + tl.sum(tl.where(at, value_bits, 0), axis=0).to(tl.float32, bitcast=True)
        value = tl.where(at, h[None, :], value)
    return value, h


@triton.jit
def scan_adjoints(decay, into, g, TILE: tl.constexpr):
    """Adjoints of a tile's states, ``into_t += g; g = decay_t into_t`` from the last row up; what leaves the first."""
    decay_bits = decay.to(tl.int32, bitcast=True)
    into_bits = into.to(tl.int32, bitcast=True)
    for back in tl.static_range(TILE):
        at = (tl.arange(0, TILE) == TILE - 1 - back)[:, None]
        g += tl.sum(tl.where(at, into_bits, 0), axis=0).to(tl.float32, bitcast=True)
        into = tl.where(at, g[None, :], into)
        g *= tl.sum(tl.where(at, decay_bits, 0), axis=0).to(tl.float32, bitcast=True)
    return into, g


@triton.jit
def load_rows(seq, batch, first, seqlen, TILE: tl.constexpr, HAS_SEQ: tl.constexpr):
    """Of a tile's rows: which lie before the end, which are real tokens, what to add to the exponent of their decay."""
    rows = first + tl.arange(0, TILE)
    inside = rows < seqlen
    real = inside
    shift = tl.zeros([TILE], tl.float32)
    if HAS_SEQ:
        ids = tl.load(seq + batch * seqlen + rows, mask=real, other=-1)
        before = tl.load(seq + batch * seqlen + rows - 1, mask=real & (rows > 0), other=-1)
        real = ids >= 0
        shift = tl.where(real & (before >= 0) & (before != ids), RESTART, 0.0)
    return inside, real, shift


@triton.jit
def load_tile(tensor, batch, first, stride_batch, stride_token, d, mask, TILE: tl.constexpr):
    """A tile of a (batch, seqlen, d_inner) tensor in float32, 0 where masked."""
    origin = tensor + batch * stride_batch + tl.cast(first, tl.int64) * stride_token
    offsets = tl.arange(0, TILE)[:, None] * stride_token + d[None, :]
    return tl.load(origin + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(tensor, value, batch, first, seqlen, d_inner, d, mask, TILE: tl.constexpr):
    """Store a tile of a contiguous (batch, seqlen, d_inner) tensor."""
    origin = tensor + (batch * seqlen + first) * d_inner
    offsets = tl.arange(0, TILE)[:, None] * d_inner + d[None, :]
    tl.store(origin + offsets, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def load_step(
    delta, batch, first, stride_batch, stride_token, d, mask, bias, SOFTPLUS: tl.constexpr, TILE: tl.constexpr
):
    """The raw step of a tile (with bias) and the step itself, 0 where masked."""
    raw = load_tile(delta, batch, first, stride_batch, stride_token, d, mask, TILE) + bias[None, :]
    step = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(mask, step, 0.0)


@triton.jit
def scan_forward(
    x, delta, A2, B, C, D, z, bias, seq, y, carry, chunk_states,
    seqlen, d_inner, d_state, segment, n_segments, n_chunks, padded,
    sxb, sxt, sdb, sdt, szb, szt,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISE: tl.constexpr, SAVE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment; ``carry`` (batch, segment, n, d) holds the state before it, then the state after it."""
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    d = channels(block, BLOCK)
    d_ok = d < d_inner
    bias_d = tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    skip = tl.load(D + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_D else tl.zeros([BLOCK], tl.float32)
    carry += (batch * n_segments + part) * d_state * d_inner
    B += batch * d_state * padded
    C += batch * d_state * padded
    begin = part.to(tl.int32) * segment
    for first in range(begin, tl.minimum(begin + segment, seqlen), TILE):
        inside, real, shift = load_rows(seq, batch, first, seqlen, TILE, HAS_SEQ)
        mask = real[:, None] & d_ok[None, :]
        _, step = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
        drive = step * load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
        total = tl.zeros([TILE, BLOCK], tl.float32)
        saved = chunk_states + (batch * n_chunks + first // CHUNK) * d_state * d_inner
        for n in range(d_state):
            a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
            b_row = tl.load(B + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
            c_row = tl.load(C + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
            h = tl.load(carry + n * d_inner + d, mask=d_ok, other=0.0)
            if SAVE:
                tl.store(saved + n * d_inner + d, h, mask=d_ok & (first % CHUNK == 0))
            decay = decay_of(step * a[None, :] + shift[:, None], PRECISE)
            states, h = scan_states(decay, drive * b_row[:, None], h, TILE)
            tl.store(carry + n * d_inner + d, h, mask=d_ok)
            total += states * c_row[:, None]
        if HAS_D:
            total += skip[None, :] * load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
        if HAS_Z:
            gate = load_tile(z, batch, first, szb, szt, d, mask, TILE)
            total *= gate * sigmoid(gate)
        store_tile(y, total, batch, first, seqlen, d_inner, d, inside[:, None] & d_ok[None, :], TILE)
        tl.debug_barrier()  # the next tile reads what this one stored in carry


@triton.jit
def segment_states(
    x, delta, A2, B, bias, seq, carry, exponent, shifts,
    seqlen, d_inner, d_state, segment, n_segments, padded,
    sxb, sxt, sdb, sdt,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """State after one segment that starts from zero (``carry``, zeroed), and the sum of its steps and its restarts."""
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    d = channels(block, BLOCK)
    d_ok = d < d_inner
    bias_d = tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    carry += (batch * n_segments + part) * d_state * d_inner
    B += batch * d_state * padded
    begin = part.to(tl.int32) * segment
    steps = tl.zeros([BLOCK], tl.float32)
    restarts = 0.0
    for first in range(begin, tl.minimum(begin + segment, seqlen), TILE):
        _inside, real, shift = load_rows(seq, batch, first, seqlen, TILE, HAS_SEQ)
        mask = real[:, None] & d_ok[None, :]
        _, step = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
        drive = step * load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
        steps += tl.sum(step, axis=0)
        restarts += tl.sum(shift, axis=0)
        for n in range(d_state):
            a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
            b_row = tl.load(B + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
            h = tl.load(carry + n * d_inner + d, mask=d_ok, other=0.0)
            decay = decay_of(step * a[None, :] + shift[:, None], PRECISE)
            _, h = scan_states(decay, drive * b_row[:, None], h, TILE)
            tl.store(carry + n * d_inner + d, h, mask=d_ok)
        tl.debug_barrier()
    tl.store(exponent + (batch * n_segments + part) * d_inner + d, steps, mask=d_ok)
    tl.store(shifts + batch * n_segments + part, restarts)


@triton.jit
def segment_adjoints(
    grad_y, delta, A2, C, z, bias, seq, carry, exponent, shifts,
    seqlen, d_inner, d_state, segment, n_segments, padded,
    sgb, sgt, sdb, sdt, szb, szt,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adjoint before one segment that gets none from later tokens (``carry``, zeroed); the rest as `segment_states`."""
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    d = channels(block, BLOCK)
    d_ok = d < d_inner
    bias_d = tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    carry += (batch * n_segments + part) * d_state * d_inner
    C += batch * d_state * padded
    begin = part.to(tl.int32) * segment
    n_tiles = (tl.minimum(begin + segment, seqlen) - begin + TILE - 1) // TILE
    steps = tl.zeros([BLOCK], tl.float32)
    restarts = 0.0
    for index in range(n_tiles):
        first = begin + (n_tiles - 1 - index) * TILE
        _inside, real, shift = load_rows(seq, batch, first, seqlen, TILE, HAS_SEQ)
        mask = real[:, None] & d_ok[None, :]
        _, step = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
        grad = load_tile(grad_y, batch, first, sgb, sgt, d, mask, TILE)
        if HAS_Z:
            gate = load_tile(z, batch, first, szb, szt, d, mask, TILE)
            grad *= gate * sigmoid(gate)
        steps += tl.sum(step, axis=0)
        restarts += tl.sum(shift, axis=0)
        for n in range(d_state):
            a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
            c_row = tl.load(C + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
            g = tl.load(carry + n * d_inner + d, mask=d_ok, other=0.0)
            decay = decay_of(step * a[None, :] + shift[:, None], PRECISE)
            _, g = scan_adjoints(decay, grad * c_row[:, None], g, TILE)
            tl.store(carry + n * d_inner + d, g, mask=d_ok)
        tl.debug_barrier()
    tl.store(exponent + (batch * n_segments + part) * d_inner + d, steps, mask=d_ok)
    tl.store(shifts + batch * n_segments + part, restarts)


@triton.jit
def chain_segments(
    carry, exponent, shifts, start, A2, d_inner, d_state, n_segments, REVERSE: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what leaves each segment started from zero into what enters it; ``start`` (batch, n, d) ends as the exit."""
    d = channels(tl.program_id(0), BLOCK)
    d_ok = d < d_inner
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2)
    at = start + (batch * d_state + n) * d_inner + d
    a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
    h = tl.load(at, mask=d_ok, other=0.0)
    for index in range(n_segments):
        part = batch * n_segments + (n_segments - 1 - index if REVERSE else index)
        place = carry + (part * d_state + n) * d_inner + d
        local = tl.load(place, mask=d_ok, other=0.0)
        tl.store(place, h, mask=d_ok)
        steps = tl.load(exponent + part * d_inner + d, mask=d_ok, other=0.0)
        h = decay_of(steps * a + tl.load(shifts + part), PRECISE) * h + local
    tl.store(at, h, mask=d_ok)


@triton.jit
def scan_backward(
    grad_y, x, delta, A2, B, C, D, z, bias, seq, chunk_states, carry, tile_states,
    grad_x, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias,
    seqlen, d_inner, d_state, segment, n_segments, n_chunks, n_batch, padded,
    sgb, sgt, sxb, sxt, sdb, sdt, szb, szt,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment, chunk by chunk from its end.

    For each chunk the states at its tiles are recomputed from the saved one into ``tile_states`` (program, tile, n, d);
    then each tile, from the last, recomputes its states and scans the adjoints backwards. ``carry`` (batch, segment, n,
    d) holds the adjoint that enters from later tokens, then the one that leaves. grad_B and grad_C are partial sums
    (block, batch, n, padded), grad_A (batch, segment, n, d), grad_D and grad_bias (batch, segment, d).
    """
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    d = channels(block, BLOCK)
    d_ok = d < d_inner
    bias_d = tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    skip = tl.load(D + d, mask=d_ok, other=0.0).to(tl.float32) if HAS_D else tl.zeros([BLOCK], tl.float32)
    program = (batch * n_segments + part) * tl.num_programs(0) + block
    tile_states += program * (CHUNK // TILE) * d_state * BLOCK + lane
    carry += (batch * n_segments + part) * d_state * d_inner
    grad_A += (batch * n_segments + part) * d_state * d_inner
    B += batch * d_state * padded
    C += batch * d_state * padded
    grad_B += (block.to(tl.int64) * n_batch + batch) * d_state * padded
    grad_C += (block.to(tl.int64) * n_batch + batch) * d_state * padded
    begin = part.to(tl.int32) * segment
    segment_chunks = (tl.minimum(begin + segment, seqlen) - begin + CHUNK - 1) // CHUNK
    sum_D = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for index in range(segment_chunks):
        chunk_begin = begin + (segment_chunks - 1 - index) * CHUNK
        n_tiles = (tl.minimum(chunk_begin + CHUNK, seqlen) - chunk_begin + TILE - 1) // TILE
        saved = chunk_states + (batch * n_chunks + chunk_begin // CHUNK) * d_state * d_inner
        for n in range(d_state):
            h = tl.load(saved + n * d_inner + d, mask=d_ok, other=0.0)
            tl.store(tile_states + n * BLOCK, h)
        tl.debug_barrier()

        for tile in range(n_tiles - 1):
            first = chunk_begin + tile * TILE
            inside, real, shift = load_rows(seq, batch, first, seqlen, TILE, HAS_SEQ)
            mask = real[:, None] & d_ok[None, :]
            _, step = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
            drive = step * load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
            here = tile_states + tile * d_state * BLOCK
            for n in range(d_state):
                a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
                b_row = tl.load(B + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
                h = tl.load(here + n * BLOCK)
                decay = decay_of(step * a[None, :] + shift[:, None], PRECISE)
                states, h = scan_states(decay, drive * b_row[:, None], h, TILE)
                tl.store(here + (d_state + n) * BLOCK, h)
            tl.debug_barrier()

        for back in range(n_tiles):
            tile = n_tiles - 1 - back
            first = chunk_begin + tile * TILE
            inside, real, shift = load_rows(seq, batch, first, seqlen, TILE, HAS_SEQ)
            mask = real[:, None] & d_ok[None, :]
            _, step = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
            drive = step * load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
            grad = load_tile(grad_y, batch, first, sgb, sgt, d, mask, TILE)
            if HAS_Z:
                gate = load_tile(z, batch, first, szb, szt, d, mask, TILE)
                grad *= gate * sigmoid(gate)
                total = tl.zeros([TILE, BLOCK], tl.float32)
            grad_exponent = tl.zeros([TILE, BLOCK], tl.float32)
            grad_drive = tl.zeros([TILE, BLOCK], tl.float32)
            here = tile_states + tile * d_state * BLOCK
            for n in range(d_state):
                a = tl.load(A2 + n * d_inner + d, mask=d_ok, other=0.0)
                b_row = tl.load(B + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
                c_row = tl.load(C + n * padded + first + tl.arange(0, TILE)).to(tl.float32)
                h = tl.load(here + n * BLOCK)
                g = tl.load(carry + n * d_inner + d, mask=d_ok, other=0.0)
                sum_A = tl.load(grad_A + n * d_inner + d, mask=d_ok, other=0.0)
                decay = decay_of(step * a[None, :] + shift[:, None], PRECISE)
                value = drive * b_row[:, None]
                states, h = scan_states(decay, value, h, TILE)
                into, g = scan_adjoints(decay, grad * c_row[:, None], g, TILE)
                tl.store(carry + n * d_inner + d, g, mask=d_ok)
                # states - value is decay * (state before): the gradient of the exponent needs no shifted tile
                pull = into * (states - value)
                grad_exponent += pull * a[None, :]
                grad_drive += into * b_row[:, None]
                tl.store(grad_A + n * d_inner + d, sum_A + tl.sum(pull * step, axis=0), mask=d_ok)
                if HAS_Z:
                    total += states * c_row[:, None]
                at = n * padded + first + tl.arange(0, TILE)
                tl.store(grad_B + at, tl.sum(into * drive, axis=1))
                tl.store(grad_C + at, tl.sum(states * grad, axis=1))
            tl.debug_barrier()

            # Loaded again rather than held in registers through the loop over the states
            raw, _ = load_step(delta, batch, first, sdb, sdt, d, mask, bias_d, SOFTPLUS, TILE)
            xt = load_tile(x, batch, first, sxb, sxt, d, mask, TILE)
            sum_D += tl.sum(grad * xt, axis=0)
            kept = inside[:, None] & d_ok[None, :]
            to_x = tl.where(mask, grad_drive * step + skip[None, :] * grad, 0.0)
            store_tile(grad_x, to_x, batch, first, seqlen, d_inner, d, kept, TILE)
            to_delta = grad_exponent * LN_2 + grad_drive * xt
            if SOFTPLUS:
                to_delta *= sigmoid(raw)
            to_delta = tl.where(mask, to_delta, 0.0)
            sum_bias += tl.sum(to_delta, axis=0)
            store_tile(grad_delta, to_delta, batch, first, seqlen, d_inner, d, kept, TILE)
            if HAS_Z:
                gate = load_tile(z, batch, first, szb, szt, d, mask, TILE)
                gate_slope = sigmoid(gate)
                gate_slope *= 1.0 + gate * (1.0 - gate_slope)
                to_z = load_tile(grad_y, batch, first, sgb, sgt, d, mask, TILE) * gate_slope
                to_z *= total + skip[None, :] * xt
                store_tile(grad_z, to_z, batch, first, seqlen, d_inner, d, kept, TILE)
    tl.store(grad_D + (batch * n_segments + part) * d_inner + d, sum_D, mask=d_ok)
    tl.store(grad_bias + (batch * n_segments + part) * d_inner + d, sum_bias, mask=d_ok)


@triton.jit
def transpose_matrix(
    source, target, seq, seqlen, d_state, padded, sb, st, sn,
    HAS_SEQ: tl.constexpr, ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Copy B or C (batch, seqlen, n) to (batch, n, padded), 0 at padding tokens and past the end."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(2) * STATES + tl.arange(0, STATES)
    batch = tl.program_id(1).to(tl.int64)
    real = rows < seqlen
    if HAS_SEQ:
        real = real & (tl.load(seq + batch * seqlen + rows, mask=real, other=-1) >= 0)
    n_ok = n < d_state
    offsets = rows.to(tl.int64)[:, None] * st + n[None, :] * sn
    value = tl.load(source + batch * sb + offsets, mask=real[:, None] & n_ok[None, :], other=0.0)
    place = target + (batch * d_state + n[:, None]) * padded + rows[None, :]
    tl.store(place, tl.trans(value), mask=n_ok[:, None] & (rows < padded)[None, :])


@triton.jit
def state_update(
    state, x, delta, A, B, C, D, z, bias, y, new_state, d_inner, d_state,
    sxb, sdb, sBb, sBn, sCb, sCn, szb, ssb, ssd, ssn,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One token of one row and BLOCK channels; all states of a channel side by side."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    batch = tl.program_id(1).to(tl.int64)
    d_ok = d < d_inner
    n_ok = n < d_state
    mask = d_ok[:, None] & n_ok[None, :]
    raw = tl.load(delta + batch * sdb + d, mask=d_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    step = softplus(raw) if SOFTPLUS else raw
    xt = tl.load(x + batch * sxb + d, mask=d_ok, other=0.0).to(tl.float32)
    a = tl.load(A + d[:, None] * d_state + n[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(B + batch * sBb + n * sBn, mask=n_ok, other=0.0).to(tl.float32)
    c = tl.load(C + batch * sCb + n * sCn, mask=n_ok, other=0.0).to(tl.float32)
    h = tl.load(state + batch * ssb + d[:, None] * ssd + n[None, :] * ssn, mask=mask, other=0.0).to(tl.float32)
    h = exp2(step[:, None] * (a * LOG2_E)) * h + (step * xt)[:, None] * b[None, :]
    tl.store(new_state + (batch * d_inner + d[:, None]) * d_state + n[None, :], h, mask=mask)
    out = tl.sum(h * c[None, :], axis=1)
    if HAS_D:
        out += tl.load(D + d, mask=d_ok, other=0.0).to(tl.float32) * xt
    if HAS_Z:
        gate = tl.load(z + batch * szb + d, mask=d_ok, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * d_inner + d, out.to(y.dtype.element_ty), mask=d_ok)
