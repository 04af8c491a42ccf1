"""The selective scan on a GPU: by Triton's kernels, or by CUDA C++ kernels compiled at run time.

Both give the same results up to rounding, and the same run to run: sums over programs go through buffers in a fixed
order, no atomics. The environment variable ``MAMBACUS_GPU_KERNELS`` (``triton`` or ``cuda``) chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambacus.ops.halves import Place, gradient_place
from mambacus.ops.nvrtc import choose_kernels, on_device
from mambacus.ops.selective_scan import gpu_cuda
from mambacus.ops.selective_scan.gpu_cuda import chunk_length

if TYPE_CHECKING:
    from mambacus.ops.selective_scan import gpu_triton


def implementation(x: Tensor, d_state: int, *others: Tensor | None) -> tuple[str, str]:
    """Return ``cuda`` or ``triton``, and the reason, for inputs like these.

    Raises:
        UserError: as `choose_kernels`.
    """
    return choose_kernels("selective_scan", gpu_cuda.obstacle(x, d_state, *others))


def forward(
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
    save_states: bool,
    *,
    plan: gpu_cuda.Plan | gpu_triton.Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels behind ``mambacus::selective_scan_forward``.

    Returns:
        y, final_state, and the states at the chunks' first tokens for `backward` (its last two dimensions hold
        (d_state, d_inner) in this order whatever the shape says). The type of ``plan`` overrides the choice of kernels.
    """
    inputs = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx)
    if not _takes_cuda(plan, x, delta, A, B, C, z):
        from mambacus.ops.selective_scan import gpu_triton  # needs Triton

        assert not isinstance(plan, gpu_cuda.Plan)
        return gpu_triton.forward(*inputs, initial_state, save_states, plan=plan)
    assert plan is None or isinstance(plan, gpu_cuda.Plan)
    chunk = chunk_length(A.shape[1])
    with on_device(x.device):
        return gpu_cuda.forward(gpu_cuda.Inputs.of(*inputs), initial_state, save_states, plan, chunk)


def backward(
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
    *,
    plan: gpu_cuda.Plan | gpu_triton.Plan | None = None,
    place: Place | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run the kernels behind ``mambacus::selective_scan_backward``.

    ``y``, from `forward`, spares the CUDA kernels the sums over the states where `gpu_cuda.reads_output`.

    Returns:
        Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; an empty tensor for each that is None. That of
        z lies at ``place`` if the CUDA kernels run.

    Memory:
        Besides the gradients, for each token and channel: partial sums of the gradients of B and C, ``8 d_state /
        block`` bytes, a block being 32 to 128 channels; Triton's also one state a tile, ``4 d_state / tile`` bytes.
    """
    inputs = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx)
    if not _takes_cuda(plan, x, delta, A, B, C, z):
        from mambacus.ops.selective_scan import gpu_triton  # needs Triton

        assert not isinstance(plan, gpu_cuda.Plan)
        return gpu_triton.backward(grad_y, grad_final_state, *inputs, initial_state, chunk_states, plan=plan)
    assert plan is None or isinstance(plan, gpu_cuda.Plan)
    chunk = chunk_length(A.shape[1])
    with on_device(x.device):
        grads = gpu_cuda.backward(
            gpu_cuda.Inputs.of(*inputs), grad_y, grad_final_state, chunk_states, plan, chunk,
            wants_initial=initial_state is not None, grad_z=None if z is None or place is None else place.like(z),
            y=y if gpu_cuda.reads_output(x, z) else None,
        )  # fmt: skip
        wanted = (x, delta, A, B, C, D, z, delta_bias, initial_state)
        return tuple(
            x.new_empty(0) if like is None else grad if grad.dtype == like.dtype else grad.to(like.dtype)
            for grad, like in zip(grads, wanted, strict=True)
        )


def update(state: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::selective_state_update``; the new state goes to a last argument, if given."""
    from mambacus.ops.selective_scan import gpu_triton  # needs Triton

    return gpu_triton.update(state, x, *args)


def scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, seq_idx: Tensor | None, initial_state: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and final_state, differentiable if ``needs_grad``: as the custom ops do, with less overhead."""
    given = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state)
    if needs_grad:
        y, final_state = _Scan.apply(*given)
        return y, final_state
    return forward(*given, False)[:2]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        saving: Any = (*given, True)
        y, final_state, chunk_states = forward(*saving)
        *tensors, ctx.delta_softplus, seq_idx, initial_state = given
        kept = y if keeps_output(ctx.needs_input_grad[2], *given[:7]) else None
        ctx.save_for_backward(*tensors, seq_idx, initial_state, chunk_states, kept)
        ctx.place = gradient_place(given[6])
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, seq_idx, initial_state, chunk_states, y = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(tensors[0])
        others: Any = (ctx.delta_softplus, seq_idx, initial_state, chunk_states)
        grads = backward(grad_y, grad_final_state, *(*tensors, *others), place=ctx.place, y=y)
        given = (*tensors, initial_state)
        found = [None if tensor is None else grad for tensor, grad in zip(given, grads, strict=True)]
        return *found[:8], None, None, found[8]


def keeps_output(
    trains_A: bool, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> bool:
    """Tell whether y is kept for the backward pass, where that takes no memory: by who trains A.

    The product after the scan then trains its weight too and keeps y for that. With frozen weights nobody keeps it.
    """
    return trains_A and gpu_cuda.reads_output(x, z) and _takes_cuda(None, x, delta, A, B, C, z)


def _takes_cuda(plan: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> bool:
    if plan is not None:
        return isinstance(plan, gpu_cuda.Plan)
    return implementation(x, A.shape[1], delta, B, C, z)[0] == "cuda"
