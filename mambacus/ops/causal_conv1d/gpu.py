"""The causal convolution on a GPU: by Triton's kernels, or by CUDA C++ kernels compiled at run time.

Results are the same run to run: no atomics. ``MAMBACUS_GPU_KERNELS`` (``triton`` or ``cuda``) chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambacus.ops.causal_conv1d import gpu_cuda
from mambacus.ops.halves import Place, gradient_place
from mambacus.ops.nvrtc import choose_kernels, on_device


def implementation(x: Tensor, width: int, *others: Tensor | None) -> tuple[str, str]:
    """Return ``cuda`` or ``triton``, and the reason, for inputs like these.

    Raises:
        UserError: as `choose_kernels`.
    """
    return choose_kernels("causal_conv1d", gpu_cuda.obstacle(x, width, *others))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_forward``."""
    if implementation(x, weight.shape[1], initial_state)[0] == "triton":
        from mambacus.ops.causal_conv1d import gpu_triton  # needs Triton

        return gpu_triton.forward(x, weight, bias, silu, seq_idx, initial_state)
    with on_device(x.device):
        return gpu_cuda.forward(x, weight, bias, silu, seq_idx, initial_state)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    *,
    place: Place | None = None,
    grad_twin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels behind ``mambacus::causal_conv1d_backward``; ``grad_twin`` is added to ``grad_y``.

    Returns:
        Gradients of x, weight, bias, initial_state; an empty tensor for each that is None. That of x lies at ``place``
        if the CUDA kernels run.
    """
    if implementation(x, weight.shape[1], initial_state)[0] == "triton":
        from mambacus.ops.causal_conv1d import gpu_triton  # needs Triton

        grad_y = grad_y if grad_twin is None else grad_y + grad_twin
        return gpu_triton.backward(grad_y, grad_final_state, x, weight, bias, silu, seq_idx, initial_state)
    with on_device(x.device):
        grad_x, grad_weight, grad_bias, grad_state = gpu_cuda.backward(
            grad_y, grad_final_state, x, weight, bias, silu, seq_idx, initial_state,
            None if place is None else place.like(x), grad_twin,
        )  # fmt: skip
    no_bias = x.new_empty(0)
    return grad_x, grad_weight.to(weight.dtype), no_bias if bias is None else grad_bias.to(bias.dtype), grad_state


def update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_update``; the new state goes to ``out``, if given."""
    from mambacus.ops.causal_conv1d import gpu_triton  # needs Triton

    return gpu_triton.update(x, conv_state, weight, bias, silu, out)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, initial_state: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and final_state, differentiable if ``needs_grad``: as the custom ops do, with less overhead.

    A differentiable y has a `mambacus.ops.twins` twin.
    """
    given = (x, weight, bias, silu, seq_idx, initial_state)
    if needs_grad:
        y, twin, final_state = _Conv.apply(*given)
        y.twin = twin
        return y, final_state
    return forward(*given)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, ctx.silu, seq_idx, initial_state = given
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_state)
        ctx.place = gradient_place(x)
        ctx.set_materialize_grads(False)
        y, final_state = forward(*given)
        return y, y.detach(), final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_twin: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx, initial_state = ctx.saved_tensors
        if grad_y is None:
            grad_y, grad_twin = grad_twin, None
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        grad_x, grad_weight, grad_bias, grad_state = backward(
            grad_y, grad_final_state, x, weight, bias, ctx.silu, seq_idx, initial_state, place=ctx.place,
            grad_twin=grad_twin,
        )  # fmt: skip
        no_bias, no_state = bias is None, initial_state is None
        return grad_x, grad_weight, None if no_bias else grad_bias, None, None, None if no_state else grad_state
