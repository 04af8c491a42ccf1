"""The selective scan on a GPU: by Triton's kernels, or by CUDA C++ kernels compiled at run time.

Both give the same results up to rounding, and the same run to run: sums over programs go through buffers in a fixed
order, no atomics. The environment variable ``MAMBACUS_GPU_KERNELS`` (``triton`` or ``cuda``) chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambacus.ops.nvrtc import choose_kernels
from mambacus.ops.selective_scan import gpu_cuda

if TYPE_CHECKING:
    from mambacus.ops.selective_scan import gpu_triton


def chunk_length(d_state: int) -> int:
    """Return the number of tokens between two saved states: 64, or more for more than 64 states."""
    return max(64, 1 << (d_state - 1).bit_length())


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
    with torch.cuda.device(x.device):
        plan = plan or gpu_cuda.forward_plan(x, A.shape[1], chunk)
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
) -> tuple[Tensor, ...]:
    """Run the kernels behind ``mambacus::selective_scan_backward``.

    Returns:
        Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; an empty tensor for each that is None.

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
    with torch.cuda.device(x.device):
        plan = plan or gpu_cuda.backward_plan(x, A.shape[1], chunk)
        grads = gpu_cuda.backward(
            gpu_cuda.Inputs.of(*inputs), grad_y, grad_final_state, chunk_states, plan, chunk,
            wants_initial=initial_state is not None,
        )  # fmt: skip
        wanted = (x, delta, A, B, C, D, z, delta_bias, initial_state)
        return tuple(
            x.new_empty(0) if like is None else grad.to(like.dtype) for grad, like in zip(grads, wanted, strict=True)
        )


def update(state: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::selective_state_update``."""
    from mambacus.ops.selective_scan import gpu_triton  # needs Triton

    return gpu_triton.update(state, x, *args)


def _takes_cuda(plan: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> bool:
    if plan is not None:
        return isinstance(plan, gpu_cuda.Plan)
    return implementation(x, A.shape[1], delta, B, C, z)[0] == "cuda"
