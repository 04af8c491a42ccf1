"""One function chooses the backend of an op and says why."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.ops import nvrtc
from mambacus.runtime.errors import UserError, suggest

_PLAIN = (Tensor, nn.Parameter)
_TRITON_ALONE = ("selective_state_update", "causal_conv1d_update")  # on a GPU; `decode_step` has them in CUDA C++
OPS = ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update")
BACKENDS = ("auto", "reference", "cpu", "triton")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and the reason for it.

    Attributes:
        name: ``reference``, ``cpu`` or ``triton``.
        reason: one clause for the record, for example ``requested`` or ``cpu device``.
    """

    name: str
    reason: str


@functools.lru_cache(maxsize=256)
def choose_backend(
    op: str, device: torch.device, requested: str = "auto", *, dtype: torch.dtype | None = None
) -> Choice:
    """Choose the backend for one op.

    ``auto`` takes the kernel of the device. It takes the reference instead, which is exact but slow, for float64 (the
    kernels compute in float32) and, with a warning, where no kernel can run.

    Args:
        op: name of the op, for messages.
        device: device of the op's first tensor.
        requested: ``auto``, ``reference``, ``cpu`` or ``triton``.
        dtype: dtype of the op's first tensor; None means any dtype a kernel takes.

    Raises:
        UserError: ``requested`` is unknown or names a backend that cannot run here; the message says why.
    """
    if requested not in BACKENDS:
        raise UserError(
            f"{op}: backend: expected one of {', '.join(BACKENDS)}, got {requested!r}{suggest(requested, BACKENDS)}"
        )
    if requested == "reference":
        return Choice("reference", "requested")
    if requested != "auto":
        obstacle = _obstacle(op, requested, device, dtype)
        if obstacle:
            raise UserError(f"{op}: backend {requested!r} cannot run: {obstacle}")
        return Choice(requested, "requested")
    if dtype == torch.float64:
        return Choice("reference", "float64 input; the kernels compute in float32")
    native = "triton" if device.type == "cuda" else "cpu"
    obstacle = _obstacle(op, native, device, dtype)
    if obstacle is None:
        rocm = native == "triton" and torch.version.hip is not None
        return Choice(native, "rocm device, untested" if rocm else f"{device.type} device")
    warnings.warn(f"{op}: running the slow reference implementation: {obstacle}", RuntimeWarning, stacklevel=3)
    return Choice("reference", obstacle)


def which_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return what ``auto`` runs on a device, for a record.

    Returns:
        ``backends``, for each op its ``name`` and ``reason``, and ``kernels``, what those are here and why.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever runs the op is warned; what is kept of choices is not touched
        backends = {op: dataclasses.asdict(choose_backend.__wrapped__(op, device, dtype=dtype)) for op in OPS}
    if device.type != "cuda":
        return {"backends": backends, "kernels": "numba, compiled for this processor when first used"}
    wanted, obstacle = os.environ.get("MAMBACUS_GPU_KERNELS"), nvrtc.unavailable()
    if wanted:
        kernels = f"MAMBACUS_GPU_KERNELS={wanted}"
    elif obstacle is None:
        kernels = "CUDA C++, compiled by NVRTC when first used"
    else:
        kernels = f"Triton, since NVRTC: {obstacle}"
    return {"backends": backends, "kernels": kernels}


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Return why ``backend`` cannot run ``op`` on ``device``, or None if it can."""
    device_type, package = {"cpu": ("cpu", "numba"), "triton": ("cuda", "triton")}[backend]
    # Fake tensors of torch.compile keep their device; meta tensors run no kernel and may pass as CPU.
    if device.type != device_type and not (device.type == "meta" and backend == "cpu"):
        return f"it needs {device_type} tensors, got {device.type}"
    # On an NVIDIA GPU the kernels in CUDA C++ need no package: `mambacus.ops.nvrtc`
    needs_package = backend == "cpu" or op in _TRITON_ALONE or nvrtc.unavailable() is not None
    if needs_package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed: pip install 'mambacus{'[gpu]' if package == 'triton' else ''}'"
    if dtype == torch.float64:
        return "it computes in float32, got float64 input"
    return None


def runs_eagerly_on_gpu(tensor: Tensor) -> bool:
    """Tell whether a kernel may be called on ``tensor`` past torch's custom ops, which cost more time than a kernel."""
    return tensor.is_cuda and type(tensor) in _PLAIN and not torch.compiler.is_compiling()


def runs_eagerly_on_cpu(tensor: Tensor) -> bool:
    """Tell whether a kernel may be called on ``tensor`` past torch's dispatcher: real CPU memory, nothing traces."""
    return tensor.is_cpu and type(tensor) in _PLAIN and not torch.compiler.is_compiling()


def tells_changes(tensor: Tensor) -> bool:
    """Tell whether what is computed from a parameter now may be kept, since torch counts the changes of it.

    Not if something is recorded that will read the parameter again, nor if processes may share it out, which write
    into its memory without counting.
    """
    if torch.is_grad_enabled() or tensor.is_inference():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if runs_eagerly_on_gpu(tensor):
        return not torch.cuda.is_current_stream_capturing()
    return runs_eagerly_on_cpu(tensor)
