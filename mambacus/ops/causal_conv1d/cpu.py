"""The causal convolution on a CPU: what the kernels of ``cpu_kernels.py`` need, and their results.

Gradients of taps and bias are summed over the tokens of a row first and then over the rows, in an order fixed by the
shapes alone. Results are equal bit by bit for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d.cpu_kernels import GROUP, VECTORS, conv_backward, conv_forward, conv_update
from mambacus.ops.rows import address, channel_rows, copy, document_ids, is_floats, new, readable, view
from mambacus.ops.simd import LANES
from mambacus.ops.threads import thread_count

FORWARD_NANOSECONDS = 2.5  # of one thread, for one channel and token
BACKWARD_NANOSECONDS = 5.0


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_forward``; see `mambacus.ops.causal_conv1d`."""
    given, channels = x.dtype, x.shape[2]
    x, bias = readable(x), None if bias is None else readable(bias)
    batch, seqlen, d_inner = x.shape
    weight = channel_rows(weight, d_inner)
    initial_state = None if initial_state is None else channel_rows(initial_state, d_inner)
    seq_idx = document_ids(seq_idx)
    d_conv = weight.shape[1]
    y = new(batch, seqlen, d_inner, dtype=x.dtype)
    final_state = new(batch, d_inner, d_conv)
    threads = thread_count(batch * -(-d_inner // GROUP), FORWARD_NANOSECONDS * x.numel())
    scratch = new(threads, 2 * VECTORS, d_conv, LANES)
    arguments = [
        batch, seqlen, d_inner, d_conv, int(silu), address(seq_idx), address(weight), address(initial_state),
        address(scratch), *view(x), *view(bias), address(final_state), *view(y),
    ]  # fmt: skip
    conv_forward(arguments, threads)
    if d_inner > channels:
        y, final_state = y[..., :channels].contiguous(), final_state[:, :channels].contiguous()
    return y.to(given), final_state.to(given)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run the kernel behind ``mambacus::causal_conv1d_backward``; absent inputs get empty gradients."""
    d_y, inputs, shift = readable(grad_y), readable(x), None if bias is None else readable(bias)
    batch, seqlen, d_inner = inputs.shape
    taps = channel_rows(weight, d_inner)
    state = None if initial_state is None else channel_rows(initial_state, d_inner)
    d_final = None if grad_final_state is None else channel_rows(grad_final_state, d_inner)
    seq_idx = document_ids(seq_idx)
    d_conv = weight.shape[1]
    d_x = new(batch, seqlen, d_inner, dtype=inputs.dtype)
    d_weight = new(batch, d_inner, d_conv)
    d_state = torch.empty_like(d_weight)
    d_bias = new(batch, d_inner)
    threads = thread_count(batch * -(-d_inner // GROUP), BACKWARD_NANOSECONDS * inputs.numel())
    scratch = new(threads, (4 * d_conv + 1) * VECTORS * LANES + seqlen * GROUP)
    arguments = [
        batch, seqlen, d_inner, d_conv, int(silu), address(seq_idx), address(taps), address(state), address(scratch),
        *view(inputs), *view(shift), *view(d_y), address(d_final), address(d_weight), address(d_bias),
        address(d_state), *view(d_x),
    ]  # fmt: skip
    conv_backward(arguments, threads)

    def give(grad: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else grad.to(like.dtype).contiguous()

    channels = x.shape[2]
    return (
        give(d_x[..., :channels], x),
        give(d_weight.sum(0)[:channels], weight),
        give(d_bias.sum(0)[:channels], bias),
        give(d_state[:, :channels], initial_state),
    )


def update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_update``; see `mambacus.ops.causal_conv1d_update`."""
    given, (batch, channels) = x.dtype, x.shape
    x, bias = readable(x), None if bias is None else readable(bias)
    d_inner, d_conv = x.shape[1], weight.shape[1]
    weight, state = channel_rows(weight, d_inner), channel_rows(conv_state, d_inner)
    y = new(batch, d_inner, dtype=x.dtype)
    whole = d_inner == channels
    new_state = out if out is not None and whole and is_floats(out) else torch.empty_like(state)
    arguments = [
        batch, 1, d_inner, d_conv, int(silu), 0, address(weight), address(state), 0, *view(x), *view(bias),
        address(new_state), *view(y),
    ]  # fmt: skip
    conv_update(arguments, thread_count(batch * -(-d_inner // GROUP), FORWARD_NANOSECONDS * x.numel()))
    if not whole:
        y, new_state = y[:, :channels].contiguous(), new_state[:, :channels].contiguous()
    if out is None:
        return y.to(given), new_state.to(given)
    return y.to(given), out if new_state is out else copy(new_state, out)
