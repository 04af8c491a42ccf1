"""The causal depthwise convolution and its one-token update: public functions, custom ops, shapes and gradients.

Two kernels stand behind the custom ops: ``cpu.py`` (numba) and ``gpu.py`` (Triton, imported on the first CUDA call).
Each has the plain functions ``forward``, ``backward``, ``update`` with the arguments of the schemas below.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref
from mambacus.ops.checks import check_device, check_shape, check_tokens
from mambacus.ops.dispatch import choose_backend, runs_eagerly_on_cpu, runs_eagerly_on_gpu

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? seq_idx, Tensor? initial_state"
torch.library.define("mambacus::causal_conv1d_forward", f"({_INPUTS}) -> (Tensor y, Tensor final_state)")
torch.library.define(
    "mambacus::causal_conv1d_backward",
    f"(Tensor grad_y, Tensor? grad_final_state, {_INPUTS}) -> "
    "(Tensor x, Tensor weight, Tensor bias, Tensor initial_state)",
)
torch.library.define(
    "mambacus::causal_conv1d_update",
    "(Tensor x, Tensor conv_state, Tensor weight, Tensor? bias, bool silu) -> (Tensor y, Tensor new_conv_state)",
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own ``d_conv`` taps, each token seeing itself and the ``d_conv - 1`` before it.

    For every channel ``y_t = silu(bias + sum_k weight_k x_{t - d_conv + 1 + k})``, where inputs before the document are
    those of ``initial_state`` for the first document of a row, and zeros else.

    Args:
        x: (batch, seqlen, d_inner), seqlen >= 1, any float dtype, as all arguments may have.
        weight: taps, oldest first, (d_inner, d_conv).
        bias: (d_inner,).
        activation: ``silu``, or None for the bare convolution.
        seq_idx: document id of each token, integers (batch, seqlen). No token sees another document; tokens with a
            negative id are padding (ends of rows only): output 0, seen by no token.
        initial_state: the last ``d_conv`` inputs before the first real token, oldest first, (batch, d_inner, d_conv);
            zeros if None. Its oldest input touches no output.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Returns:
        y (batch, seqlen, d_inner) and final_state (batch, d_inner, d_conv), both in the dtype of ``x``: the last
        ``d_conv`` real inputs of the last document, oldest first, zeros before the document's start.

    Raises:
        ValueError: a shape does not fit or ``activation`` is unknown.
        UserError: the named backend cannot run here.

    Numerics:
        Sums in float32 for every input dtype; float64 input runs the reference in float64.

    Gradients:
        With respect to every tensor but ``seq_idx``, also through ``final_state``, each in the dtype of its tensor. Not
        twice differentiable, except with ``backend="reference"``.

    Memory:
        Saves its inputs only; the sums before ``silu`` are recomputed.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752), section 3.4 and figure 3.
    """
    silu = _check(x, weight, bias, activation, rank=3)
    check_tokens("seq_idx", seq_idx, x)
    check_shape("initial_state", initial_state, (x.shape[0], *weight.shape))
    check_device(x, seq_idx=seq_idx, initial_state=initial_state)
    if choose_backend("causal_conv1d", x.device, backend, dtype=x.dtype).name == "reference":
        return causal_conv1d_ref(x, weight, bias, activation=activation, seq_idx=seq_idx, initial_state=initial_state)
    given = (x, weight, bias, silu, seq_idx, initial_state)
    if runs_eagerly_on_gpu(x):
        tensors = (x, weight, bias, initial_state)
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return _kernels("cuda").conv(*given, needs_grad)
    return torch.ops.mambacus.causal_conv1d_forward(*given)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Move the convolution by one token: `causal_conv1d` of a sequence of length one, with less overhead.

    Args:
        x: (batch, d_inner).
        conv_state: the last ``d_conv`` inputs, oldest first, (batch, d_inner, d_conv); it is not changed.
        weight: taps, oldest first, (d_inner, d_conv).
        bias: (d_inner,).
        activation: ``silu`` or None.
        out: memory for the new state, shaped as ``conv_state``; it may be that itself, which then changes in place.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Returns:
        y (batch, d_inner) and the new conv_state (batch, d_inner, d_conv), both in the dtype of ``x`` (``out`` keeps
        its own).

    Raises:
        ValueError: a shape does not fit, ``activation`` is unknown, or a gradient is needed and ``out`` is given.
        UserError: the named backend cannot run here.

    Gradients:
        As those of `causal_conv1d`, which runs instead when a gradient is needed.
    """
    silu = _check(x, weight, bias, activation, rank=2)
    check_shape("conv_state", conv_state, (x.shape[0], *weight.shape))
    check_shape("out", out, conv_state.shape)
    check_device(x, conv_state=conv_state, out=out)
    tensors = (x, conv_state, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if needs_grad and out is not None:
        raise ValueError("out: expected None where a gradient is needed: it would overwrite what the gradient needs")
    if choose_backend("causal_conv1d_update", x.device, backend, dtype=x.dtype).name == "reference":
        y, state = causal_conv1d_update_ref(x, conv_state, weight, bias, activation=activation)
        return y, state if out is None else out.copy_(state)
    if needs_grad:
        y, state = causal_conv1d(
            x.unsqueeze(1), weight, bias, activation=activation, initial_state=conv_state, backend=backend
        )
        return y.squeeze(1), state
    if out is not None and runs_eagerly_on_cpu(x):
        return _kernels("cpu").update(x, conv_state, weight, bias, silu, out)
    if runs_eagerly_on_gpu(x):
        return _kernels("cuda").update(x, conv_state, weight, bias, silu, out)
    y, state = torch.ops.mambacus.causal_conv1d_update(x, conv_state, weight, bias, silu)
    return y, state if out is None else out.copy_(state)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *, rank: int) -> bool:
    """Check the arguments that both functions share; return whether silu is wanted."""
    if x.dim() != rank or (rank == 3 and x.shape[1] == 0):
        wanted = "(batch, seqlen >= 1, d_inner)" if rank == 3 else "(batch, d_inner)"
        raise ValueError(f"x: expected shape {wanted}, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight: expected shape ({x.shape[-1]}, d_conv), got {tuple(weight.shape)}")
    check_shape("bias", bias, (weight.shape[0],))
    check_device(x, weight=weight, bias=bias)
    if activation not in ("silu", None):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")
    return activation == "silu"


@functools.cache
def _kernels(device_type: str) -> ModuleType:
    """Return the kernel module of a device type."""
    name = "gpu" if device_type == "cuda" else "cpu"
    return importlib.import_module(f"mambacus.ops.causal_conv1d.{name}")


@torch.library.impl("mambacus::causal_conv1d_forward", ["CPU", "CUDA"])
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _kernels(x.device.type).forward(x, *args)


@torch.library.impl("mambacus::causal_conv1d_backward", ["CPU", "CUDA"])
def _backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _kernels(grad_y.device.type).backward(grad_y, *args)


@torch.library.impl("mambacus::causal_conv1d_update", ["CPU", "CUDA"])
def _update(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _kernels(x.device.type).update(x, *args)


@torch.library.register_fake("mambacus::causal_conv1d_forward")
def _forward_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *weight.shape)


@torch.library.register_fake("mambacus::causal_conv1d_backward")
def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs)


@torch.library.register_fake("mambacus::causal_conv1d_update")
def _update_fake(x: Tensor, conv_state: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(conv_state.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, silu, seq_idx, initial_state = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_state)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, seq_idx, initial_state = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    d_x, d_weight, d_bias, d_initial = torch.ops.mambacus.causal_conv1d_backward(
        grad_y, grad_final_state, x, weight, bias, ctx.silu, seq_idx, initial_state
    )
    return d_x, d_weight, None if bias is None else d_bias, None, None, None if initial_state is None else d_initial


torch.library.register_autograd("mambacus::causal_conv1d_forward", _differentiate, setup_context=_save_for_backward)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("causal_conv1d is not twice differentiable, except with backend='reference'")


torch.library.register_autograd("mambacus::causal_conv1d_backward", _refuse)
