"""What ``mambacus bench scan`` measures: the selective scan alone, beside the machine's limits and an exact result.

On a GPU two times for each: *eager* is what a caller sees, launches included; the other replays the same launches as a
CUDA graph. Both are medians over events after a warm-up. On a CPU both are wall-clock medians.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacus.measuring.exact import GRADIENTS, scan_errors
from mambacus.measuring.timing import captured, median, time_ms
from mambacus.ops import selective_scan

STATES = 16
BUDGET_MS = 40.0  # of work for one time
# Median ms of mamba-ssm 2.3.2's CUDA kernel, forward and forward + backward, bf16, on an H100 80GB HBM3, torch 2.11
MAMBA_SSM_H100 = {
    (1, 1536, 2048): (0.071, 0.528),
    (8, 1536, 2048): (0.452, 2.449),
    (16, 1536, 2048): (0.881, 4.812),
    (64, 1536, 512): (0.800, 4.443),
    (1, 1536, 32768): (1.122, 5.514),
    (1, 1536, 131072): (4.370, 21.16),
    (1, 4096, 2048): (0.164, 0.937),
    (8, 4096, 2048): (1.170, 6.385),
    (1, 4096, 65536): (6.010, 28.36),
    (1, 8192, 8192): (1.483, 7.036),
}

Shape = tuple[int, int, int]  # batch, d_inner, seqlen


def scan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return inputs in the range of a trained model, in the order of `GRADIENTS`; A, D and delta_bias are float32."""
    batch, d_inner, seqlen = shape
    g = torch.Generator(device=device).manual_seed(seqlen)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    rates = torch.arange(1, STATES + 1, device=device).float().repeat(d_inner, 1)
    A = -rates * torch.exp(0.1 * normal(d_inner, 1))
    x, delta, z = (normal(batch, seqlen, d_inner).to(dtype) for _ in range(3))
    B, C = (normal(batch, seqlen, STATES).to(dtype) for _ in range(2))
    return [x, delta, A, B, C, normal(d_inner), z, normal(d_inner) - 4.0]


class Calls:
    """A forward pass as in inference, and a forward and backward pass as in training, of the same inputs."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self._inputs = scan_inputs(shape, device, dtype)
        self._leaves = [t.detach().requires_grad_() for t in self._inputs]
        self._grad_y = torch.randn_like(self._inputs[0])

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        """Return y and the final state."""
        return selective_scan(*self._inputs[:7], delta_bias=self._inputs[7])

    def both(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return y, the final state and the gradients in the order of `GRADIENTS`."""
        y, state = selective_scan(*self._leaves[:7], delta_bias=self._leaves[7])
        return y.detach(), state.detach(), torch.autograd.grad(y, self._leaves, self._grad_y)

    def errors(self) -> dict[str, float]:
        """Return relative errors of every output and gradient of these very passes against float64."""
        inferred, inferred_state = self.forward()
        y, state, grads = self.both()
        outputs = {"y": y, "final_state": state, "y_inference": inferred, "final_state_inference": inferred_state}
        return scan_errors(self._inputs, self._grad_y, outputs, dict(zip(GRADIENTS, grads, strict=True)))


def measure_scan(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return times, peak memory, errors and, where known, the times of mamba-ssm's CUDA kernel.

    Returns:
        ``forward_ms``, ``both_ms``, ``forward_eager_ms``, ``both_eager_ms``, ``memory_bytes`` (peak of a forward and
        backward pass, inputs included), ``errors`` by tensor, of every number of these passes (``checked_shape`` is
        the shape itself), and ``mamba_ssm_h100_ms`` (forward, both) for the shapes of `MAMBA_SSM_H100` in bfloat16.
    """
    made = Calls(shape, device, dtype)
    row: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    for name, run in (("forward", made.forward), ("both", made.both)):
        row[f"{name}_eager_ms"] = eager_ms(run, device)
        row[f"{name}_ms"] = graph_ms(run, device) if device.type == "cuda" else row[f"{name}_eager_ms"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        made.both()
        row["memory_bytes"] = torch.cuda.max_memory_allocated(device)
    row["errors"], row["checked_shape"] = made.errors(), list(shape)
    if dtype == torch.bfloat16 and shape in MAMBA_SSM_H100:
        row["mamba_ssm_h100_ms"] = list(MAMBA_SSM_H100[shape])
    return row


def eager_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call, over about `BUDGET_MS` of work after a warm-up."""
    first = time_ms(run, device, repeats=1, warmup=1)[0]
    count = max(5, min(50, int(BUDGET_MS / max(first, 1e-3))))
    if device.type != "cuda":
        return median(time_ms(run, device, repeats=min(count, 15), warmup=0))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return median([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])


def graph_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a replay of ``run`` captured as a CUDA graph."""
    with torch.cuda.device(device):
        return eager_ms(captured(run), device)


def exponentials_per_second(device: torch.device) -> float | None:
    """Measure how many exponentials a GPU computes; None where own CUDA kernels cannot run."""
    from mambacus.ops import nvrtc

    if device.type != "cuda" or nvrtc.unavailable():
        return None
    rounds, blocks, threads = 256, 1056, 256
    source = nvrtc.source(Path(__file__).with_name("exp.cu"))
    index = torch.cuda.current_device() if device.index is None else device.index
    program = nvrtc.Program(source, nvrtc.macros(ROUNDS=rounds), index)
    launch = nvrtc.Launch.of(program, "exponentials", (blocks, 1, 1), threads, nvrtc.struct("out", "", ""), {})
    out = torch.empty(blocks * threads, device=device)
    ms = eager_ms(lambda: launch(out=out), device)
    return 16 * rounds * blocks * threads / ms * 1e3


def limits_ms(shape: Shape, dtype: torch.dtype, ceilings: dict[str, float]) -> dict[str, float]:
    """Return the least times of a forward pass: for its exponentials, and for reading and writing each tensor once."""
    batch, d_inner, seqlen = shape
    bytes_moved = batch * seqlen * (4 * d_inner + 2 * STATES) * dtype.itemsize
    found = {"bytes_limit_ms": bytes_moved / ceilings["copy_gb_s"] / 1e6}
    if ceilings.get("exponentials_per_s"):
        found["exponentials_limit_ms"] = batch * d_inner * seqlen * STATES / ceilings["exponentials_per_s"] * 1e3
    return found
