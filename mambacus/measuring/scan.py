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

from mambacus.measuring.timing import captured, median, time_ms
from mambacus.ops import selective_scan

STATES = 16
EXACT_SHAPE = (2, 128, 512)  # at most so large is the part of a shape whose error is measured
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
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")

Shape = tuple[int, int, int]  # batch, d_inner, seqlen


def scan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return inputs in the range of a trained model, in the order of `NAMES`; A, D and delta_bias are float32."""
    batch, d_inner, seqlen = shape
    g = torch.Generator(device=device).manual_seed(seqlen)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    rates = torch.arange(1, STATES + 1, device=device).float().repeat(d_inner, 1)
    A = -rates * torch.exp(0.1 * normal(d_inner, 1))
    x, delta, z = (normal(batch, seqlen, d_inner).to(dtype) for _ in range(3))
    B, C = (normal(batch, seqlen, STATES).to(dtype) for _ in range(2))
    return [x, delta, A, B, C, normal(d_inner), z, normal(d_inner) - 4.0]


def calls(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward pass as in inference, and a forward and backward pass as in training."""
    inputs = scan_inputs(shape, device, dtype)
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad_y = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            selective_scan(*inputs[:7], delta_bias=inputs[7])

    def both() -> None:
        y, _ = selective_scan(*leaves[:7], delta_bias=leaves[7])
        torch.autograd.grad(y, leaves, grad_y)

    return forward, both


def errors(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return relative errors of outputs and gradients against the reference in float64, for a part of the shape."""
    part = tuple(min(size, most) for size, most in zip(shape, EXACT_SHAPE, strict=True))
    inputs = scan_inputs((part[0], part[1], part[2]), device, dtype)
    grad_y = torch.randn_like(inputs[0])
    found = []
    for wide, backend in ((False, "auto"), (True, "reference")):
        leaves = [(t.double() if wide else t.detach()).requires_grad_() for t in inputs]
        y, state = selective_scan(*leaves[:7], delta_bias=leaves[7], backend=backend)
        found.append((y, state, *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))))
    names = ("y", "final_state", *NAMES)
    return {
        name: ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(names, found[0], found[1], strict=True)
    }


def measure_scan(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return times, peak memory, errors and, where known, the times of mamba-ssm's CUDA kernel.

    Returns:
        ``forward_ms``, ``both_ms``, ``forward_eager_ms``, ``both_eager_ms``, ``memory_bytes`` (peak of a forward and
        backward pass, inputs included), ``errors`` by tensor, and ``mamba_ssm_h100_ms`` (forward, both) for the shapes
        of `MAMBA_SSM_H100` in bfloat16.
    """
    forward, both = calls(shape, device, dtype)
    row: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    for name, run in (("forward", forward), ("both", both)):
        row[f"{name}_eager_ms"] = eager_ms(run, device)
        row[f"{name}_ms"] = graph_ms(run, device) if device.type == "cuda" else row[f"{name}_eager_ms"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        both()
        row["memory_bytes"] = torch.cuda.max_memory_allocated(device)
    row["errors"] = errors(shape, device, dtype)
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
