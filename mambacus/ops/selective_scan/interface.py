"""The selective scan and its one-token update: public functions, torch custom ops, shapes and gradients.

Two kernels stand behind the custom ops: ``cpu.py`` (numba) and ``gpu.py`` (Triton, imported on the first CUDA call).
Each has the plain functions ``forward``, ``backward``, ``update`` with the arguments of the schemas below, and
``chunk_length(d_state)``: the number of tokens between two saved states.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.checks import check_device, check_shape, check_tokens
from mambacus.ops.dispatch import choose_backend, runs_eagerly_on_cpu, runs_eagerly_on_gpu
from mambacus.ops.selective_scan.reference import selective_scan_ref, selective_state_update_ref

_INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? seq_idx, Tensor? initial_state"
)
torch.library.define(
    "mambacus::selective_scan_forward",
    f"({_INPUTS}, bool save_states) -> (Tensor y, Tensor final_state, Tensor chunk_states)",
)
torch.library.define(
    "mambacus::selective_scan_backward",
    f"(Tensor grad_y, Tensor? grad_final_state, {_INPUTS}, Tensor chunk_states) -> (Tensor x, Tensor delta, Tensor A, "
    "Tensor B, Tensor C, Tensor D, Tensor z, Tensor delta_bias, Tensor initial_state)",
)
torch.library.define(
    "mambacus::selective_state_update",
    "(Tensor state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor y, Tensor new_state)",
)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan a selective state-space model over a sequence.

    For every channel d with a state h of ``d_state`` numbers::

        delta_t = softplus(delta_t + delta_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = (C_t . h_t + D x_t) silu(z_t)

    Args:
        x: SSM input, (batch, seqlen, d_inner), seqlen >= 1, any float dtype, as all but ``A`` and the states may have.
        delta: step before bias and softplus, (batch, seqlen, d_inner).
        A: decay rates, negative (``-exp(A_log)``), (d_inner, d_state).
        B: input matrix of each token, (batch, seqlen, d_state).
        C: output matrix of each token, (batch, seqlen, d_state).
        D: skip connection, (d_inner,).
        z: gate, (batch, seqlen, d_inner).
        delta_bias: (d_inner,).
        delta_softplus: apply softplus to the step.
        seq_idx: document id of each token, integers (batch, seqlen). The state restarts from zero where the id changes;
            tokens with a negative id are padding (ends of rows only): output 0, the state passes through.
        initial_state: state before the first real token, (batch, d_inner, d_state); zeros if None.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Returns:
        y (batch, seqlen, d_inner) in the dtype of ``x``, and final_state (batch, d_inner, d_state) in float32, the
        state after the last real token.

    Raises:
        ValueError: a shape does not fit; the message names the argument, expected and got.
        UserError: the named backend cannot run here.

    Numerics:
        States, decays and sums in float32 for every input dtype; float64 input runs the reference in float64.

    Gradients:
        With respect to every tensor but ``seq_idx``, also through ``final_state``, each in the dtype of its tensor. Not
        twice differentiable, except with ``backend="reference"``.

    Memory:
        For the backward pass the inputs are saved and one state for every ``chunk_length`` tokens: at most
        ``4 batch seqlen d_inner`` bytes more. The states between are recomputed. On a GPU y is kept too where ``A`` is
        trained, which takes no memory beside a product that trains its weight on y.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752), equations 2-4 and Algorithm 2.
    """
    _check(x, delta, A, B, C, D, z, delta_bias)
    batch, _, d_inner = x.shape
    check_tokens("seq_idx", seq_idx, x)
    check_shape("initial_state", initial_state, (batch, d_inner, A.shape[1]))
    check_device(x, seq_idx=seq_idx, initial_state=initial_state)
    if choose_backend("selective_scan", x.device, backend, dtype=x.dtype).name == "reference":
        return selective_scan_ref(
            x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, seq_idx=seq_idx,
            initial_state=initial_state,
        )  # fmt: skip
    save_states = _needs_grad(x, delta, A, B, C, D, z, delta_bias, initial_state)
    if runs_eagerly_on_gpu(x):
        inputs = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state)
        return _kernels("cuda").scan(*inputs, save_states)
    y, final_state, _ = torch.ops.mambacus.selective_scan_forward(
        x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state, save_states
    )
    return y, final_state


def selective_state_update(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Move the state by one token: `selective_scan` of a sequence of length one, with less overhead.

    Args:
        state: state before the token, (batch, d_inner, d_state) float32; it is not changed.
        x: SSM input, (batch, d_inner).
        delta: step before bias and softplus, (batch, d_inner).
        A: decay rates, (d_inner, d_state).
        B: input matrix, (batch, d_state).
        C: output matrix, (batch, d_state).
        D: skip connection, (d_inner,).
        z: gate, (batch, d_inner).
        delta_bias: (d_inner,).
        delta_softplus: apply softplus to the step.
        out: memory for the new state, shaped as ``state``; it may be ``state`` itself, which then changes in place.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Returns:
        y (batch, d_inner) in the dtype of ``x``, and the new state (batch, d_inner, d_state) in float32.

    Raises:
        ValueError: a shape does not fit, or a gradient is needed and ``out`` is given.
        UserError: the named backend cannot run here.

    Gradients:
        As those of `selective_scan`, which runs instead when a gradient is needed.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752), equation 2.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (batch, d_inner), got {tuple(x.shape)}")
    batch, d_inner = x.shape
    check_shape("state", state, (batch, d_inner, A.shape[-1]))
    check_shape("out", out, state.shape)
    check_device(x, state=state, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, out=out)
    needs_grad = _needs_grad(state, x, delta, A, B, C, D, z, delta_bias)
    if needs_grad and out is not None:
        raise ValueError("out: expected None where a gradient is needed: it would overwrite what the gradient needs")
    if choose_backend("selective_state_update", x.device, backend, dtype=x.dtype).name == "reference":
        y, new_state = selective_state_update_ref(
            state, x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus
        )
        return y, new_state if out is None else out.copy_(new_state)
    if needs_grad:
        one = [tensor.unsqueeze(1) for tensor in (x, delta, B, C)]
        y, new_state = selective_scan(
            one[0], one[1], A, one[2], one[3], D, None if z is None else z.unsqueeze(1), delta_bias=delta_bias,
            delta_softplus=delta_softplus, initial_state=state, backend=backend,
        )  # fmt: skip
        return y.squeeze(1), new_state
    check_shape("delta", delta, (batch, d_inner))
    check_shape("A", A, (d_inner, state.shape[2]))
    check_shape("B", B, (batch, state.shape[2]))
    check_shape("C", C, (batch, state.shape[2]))
    check_shape("D", D, (d_inner,))
    check_shape("z", z, (batch, d_inner))
    check_shape("delta_bias", delta_bias, (d_inner,))
    arguments = (state, x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if out is not None and runs_eagerly_on_cpu(x):
        return _kernels("cpu").update(*arguments, out)
    if runs_eagerly_on_gpu(x):
        return _kernels("cuda").update(*arguments, out)
    y, new_state = torch.ops.mambacus.selective_state_update(*arguments)
    return y, new_state if out is None else out.copy_(new_state)


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (batch, seqlen >= 1, d_inner), got {tuple(x.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A: expected shape (d_inner, d_state), got {tuple(A.shape)}")
    batch, seqlen, d_inner = x.shape
    d_state = A.shape[1]
    check_shape("delta", delta, (batch, seqlen, d_inner))
    check_shape("A", A, (d_inner, d_state))
    check_shape("B", B, (batch, seqlen, d_state))
    check_shape("C", C, (batch, seqlen, d_state))
    check_shape("D", D, (d_inner,))
    check_shape("z", z, (batch, seqlen, d_inner))
    check_shape("delta_bias", delta_bias, (d_inner,))
    check_device(x, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@functools.cache
def _kernels(device_type: str) -> ModuleType:
    """Return the kernel module of a device type; meta tensors take the CPU's shapes."""
    name = "gpu" if device_type == "cuda" else "cpu"
    return importlib.import_module(f"mambacus.ops.selective_scan.{name}")


@torch.library.impl("mambacus::selective_scan_forward", ["CPU", "CUDA"])
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(x.device.type).forward(x, *args)


@torch.library.impl("mambacus::selective_scan_backward", ["CPU", "CUDA"])
def _backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _kernels(grad_y.device.type).backward(grad_y, *args)


@torch.library.impl("mambacus::selective_state_update", ["CPU", "CUDA"])
def _update(state: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _kernels(state.device.type).update(state, *args)


@torch.library.register_fake("mambacus::selective_scan_forward")
def _forward_fake(x: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_states = args[-1]
    batch, seqlen, d_inner = x.shape
    length = _kernels(x.device.type).chunk_length(A.shape[1])
    n_chunks = (seqlen + length - 1) // length if save_states else 0
    final_state = x.new_empty(batch, d_inner, A.shape[1], dtype=torch.float32)
    chunk_states = x.new_empty(batch, n_chunks, d_inner, A.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), final_state, chunk_states


@torch.library.register_fake("mambacus::selective_scan_backward")
def _backward_fake(
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
    inputs = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs)


@torch.library.register_fake("mambacus::selective_state_update")
def _update_fake(state: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state, save_states = inputs
    if not save_states:
        raise RuntimeError("selective_scan_forward: save_states=True is needed for gradients")
    ctx.save_for_backward(x, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, output[2])
    ctx.delta_softplus = delta_softplus
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, chunk_states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    grads = torch.ops.mambacus.selective_scan_backward(
        grad_y, grad_final_state, x, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, seq_idx, initial_state,
        chunk_states,
    )  # fmt: skip
    optional = (D, z, delta_bias, initial_state)
    d_D, d_z, d_bias, d_initial = (
        None if given is None else grad for given, grad in zip(optional, grads[5:], strict=True)
    )
    return (*grads[:5], d_D, d_z, d_bias, None, None, d_initial, None)


torch.library.register_autograd("mambacus::selective_scan_forward", _differentiate, setup_context=_save_for_backward)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("selective_scan is not twice differentiable, except with backend='reference'")


torch.library.register_autograd("mambacus::selective_scan_backward", _refuse)
