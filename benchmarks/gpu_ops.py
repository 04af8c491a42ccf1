"""Compare launches of the GPU kernels, and time each kernel of a forward and backward pass.

Run from the repository: ``PYTHONPATH=. python benchmarks/gpu_ops.py --out benchmarks``; correctness is
``pytest -m gpu tests/ops``; the shapes of the published table are ``mambacus bench scan --device cuda``. Writes one
JSON record named by date and GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mambacus.measuring.scan import calls, graph_ms, scan_inputs
from mambacus.ops import nvrtc
from mambacus.ops.causal_conv1d import gpu as conv
from mambacus.ops.causal_conv1d import gpu_cuda as conv_cuda
from mambacus.ops.cross_entropy.gpu import cross_entropy_
from mambacus.ops.rms_norm import gpu as norm
from mambacus.ops.selective_scan import gpu as scan
from mambacus.ops.selective_scan.gpu_cuda import Plan
from mambacus.runtime.records import Stopwatch, write_record

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
Shape = tuple[int, int, int]  # batch, d_inner, seqlen
SHAPES: tuple[Shape, ...] = ((8, 1536, 2048), (1, 1536, 2048), (4, 4096, 2048), (1, 1536, 32768), (1, 4096, 2048))
# warps, tile, blocks for each multiprocessor
FORWARD = ((4, 32, 4), (4, 32, 3), (4, 16, 4), (2, 32, 6))
BACKWARD = ((4, 16, 2), (4, 8, 3), (4, 16, 3), (8, 8, 2))
# channels of a thread, blocks for each multiprocessor, tokens of a thread
CONV_BACKWARD = ((4, 1, 32), (4, 1, 64), *((2, blocks, run) for blocks in (6, 8) for run in (16, 32, 64, 128)))


def segments(shape: Shape) -> list[int]:
    """Return the lengths of segments worth comparing."""
    batch, d_inner, seqlen = shape
    if batch * d_inner >= 8 * 1536:
        return [seqlen]
    return sorted({-(-seqlen // (count * 64)) * 64 for count in (1, 2, 4, 8, 12, 16, 32) if count * 64 <= seqlen})


def scan_calls(shape: Shape) -> list[tuple[str, Plan, Callable[[], Any]]]:
    """Return a call of every candidate on inputs of this shape."""
    given = (*scan_inputs(shape, DEVICE, BF16), True, None, None)
    grad_y = torch.randn_like(given[0])
    _, _, chunks = scan.forward(*given, True)
    found: list[tuple[str, Plan, Callable[[], Any]]] = []
    for segment in segments(shape):
        for numbers in FORWARD if segment in segments(shape)[-1:] else FORWARD[:1]:
            plan = Plan(*numbers, segment)
            found.append(("forward", plan, lambda plan=plan: scan.forward(*given, True, plan=plan)))
        for numbers in BACKWARD if segment in segments(shape)[-1:] else BACKWARD[:2]:
            plan = Plan(*numbers, segment)
            found.append(("backward", plan, lambda plan=plan: scan.backward(grad_y, None, *given, chunks, plan=plan)))
    return found


def compile_ahead(run: Callable[[], Any]) -> None:
    """Compile on all cores what ``run`` would compile one by one: it runs once with launches left out."""
    wanted: set[nvrtc.Program] = set()
    real = nvrtc.Program.kernel

    def note(program: nvrtc.Program, *args: Any, **options: Any) -> Callable[..., None]:
        wanted.add(program)
        return lambda *_: None

    nvrtc.Program.kernel = note  # type: ignore[method-assign, assignment]
    try:
        run()
    finally:
        nvrtc.Program.kernel = real  # type: ignore[method-assign]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(nvrtc.machine_code, wanted))


def compare_launches(shape: Shape) -> list[dict[str, Any]]:
    """Return the time of every candidate, best first."""
    compile_ahead(lambda: [run() for _, _, run in scan_calls(shape)])
    rows = []
    for kernel, plan, run in scan_calls(shape):
        row = {"shape": shape, "kernel": kernel, "plan": dataclasses.astuple(plan)}
        try:
            rows.append(row | {"ms": graph_ms(run, DEVICE)})
        except nvrtc.CompileError as error:  # a launch this GPU has no room for
            rows.append(row | {"ms": float("inf"), "error": str(error)})
    return sorted(rows, key=lambda row: row["ms"])


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return {e.key[:60]: round(e.device_time_total, 1) for e in trace.key_averages() if e.device_time_total > 0}


def other_ops(shape: Shape) -> dict[str, float]:
    """Graph times of convolution and normalisation at the sizes of a model with this d_inner, and of the loss."""
    batch, d_inner, seqlen = shape

    def normal(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE).to(dtype)

    x, grad = normal(batch, seqlen, 2 * d_inner)[..., :d_inner], normal(batch, seqlen, d_inner)
    weight, bias = normal(d_inner, 4, dtype=torch.float32), normal(d_inner, dtype=torch.float32)
    residual, added = normal(batch, seqlen, d_inner // 2, dtype=torch.float32), normal(batch, seqlen, d_inner // 2)
    scale = normal(d_inner // 2, dtype=torch.float32)
    y, total, rms = norm.forward(residual, added, scale, 1e-5, BF16)
    logits, targets = normal(4096, 50280), torch.randint(50280, (4096,), device=DEVICE)
    runs: dict[str, Callable[[], Any]] = {
        "conv_forward": lambda: conv.forward(x, weight, bias, True, None, None),
        "conv_backward": lambda: conv.backward(grad, None, x, weight, bias, True, None, None),
        "norm_forward": lambda: norm.forward(residual, added, scale, 1e-5, BF16),
        "norm_backward": lambda: norm.backward(y, total, total, scale, rms, BF16),
        "cross_entropy_4096x50280": lambda: cross_entropy_(logits, targets, gradient=True),
    }
    joined, twin = torch.empty(batch, seqlen, 2 * d_inner, dtype=BF16, device=DEVICE), normal(batch, seqlen, d_inner)
    for numbers in CONV_BACKWARD:  # as in training: into one half, from two readers
        plan = conv_cuda.Plan(*numbers)
        runs[f"conv_backward, two readers {numbers}"] = lambda plan=plan: conv_cuda.backward(
            grad, None, x, weight, bias, True, None, None, joined[..., :d_inner], twin, plan
        )
    return {name: graph_ms(run, DEVICE) for name, run in runs.items()}


def main() -> None:
    """Time, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--skip-launches", action="store_true", help="do not compare launches of the scan")
    options = parser.parse_args()
    watch = Stopwatch()
    results: dict[str, Any] = {"launches": [], "kernels": {}, "others": {}}
    for shape in SHAPES[:3]:
        results["kernels"][str(shape)] = kernel_times(calls(shape, DEVICE, BF16)[1])
        results["others"][str(shape)] = other_ops(shape)
        print(shape, results["kernels"][str(shape)], results["others"][str(shape)], sep="\n", flush=True)
    for shape in () if options.skip_launches else SHAPES:
        rows = compare_launches(shape)
        results["launches"] += rows
        for kernel in ("forward", "backward"):
            found = " ".join(f"{r['plan']}:{r['ms']:.3f}" for r in rows if r["kernel"] == kernel)
            print(f"{watch.seconds:4.0f} s", shape, kernel, found, flush=True)
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"gpu-launches-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{name}.json"
    write_record(path, watch.record("bench", "launches of the GPU kernels", {}, results))
    print(path, f"{watch.seconds:.0f} s")


if __name__ == "__main__":
    main()
