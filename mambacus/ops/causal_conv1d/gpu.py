"""The causal convolution on a GPU: by Triton's kernels, or by CUDA C++ kernels compiled at run time.

Results are the same run to run: no atomics. ``MAMBACUS_GPU_KERNELS`` (``triton`` or ``cuda``) chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d import gpu_cuda
from mambacus.ops.nvrtc import choose_kernels


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
    with torch.cuda.device(x.device):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels behind ``mambacus::causal_conv1d_backward``.

    Returns:
        Gradients of x, weight, bias, initial_state; an empty tensor for each that is None.
    """
    if implementation(x, weight.shape[1], initial_state)[0] == "triton":
        from mambacus.ops.causal_conv1d import gpu_triton  # needs Triton

        return gpu_triton.backward(grad_y, grad_final_state, x, weight, bias, silu, seq_idx, initial_state)
    with torch.cuda.device(x.device):
        grad_x, grad_weight, grad_bias, grad_state = gpu_cuda.backward(
            grad_y, grad_final_state, x, weight, bias, silu, seq_idx, initial_state
        )
    no_bias = x.new_empty(0)
    return grad_x, grad_weight.to(weight.dtype), no_bias if bias is None else grad_bias.to(bias.dtype), grad_state


def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel behind ``mambacus::causal_conv1d_update``."""
    from mambacus.ops.causal_conv1d import gpu_triton  # needs Triton

    return gpu_triton.update(x, conv_state, weight, bias, silu)
