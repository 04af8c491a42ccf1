"""Time the scan and the convolution on a GPU against mamba-ssm's CUDA kernel and against the hardware's limits.

Run from the repository: ``PYTHONPATH=. python benchmarks/gpu_ops.py --out benchmarks``; correctness is
``pytest -m gpu tests/ops``, and here a gate on one shape. Writes one JSON record named by date and GPU.
Two times for each: *eager* is what a caller sees, launches included; *graph* replays the same launches as a CUDA graph.
Both are medians over CUDA events after a warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.causal_conv1d import gpu as conv
from mambacus.ops.selective_scan import gpu as scan
from mambacus.ops.selective_scan.gpu_cuda import Plan
from mambacus.ops.selective_scan.reference import selective_scan_ref
from mambacus.runtime.records import Stopwatch, write_record

# Median ms of mamba-ssm 2.3.2's CUDA kernel (forward, forward + backward), bf16, d_state 16, on an H100 80GB HBM3
OFFICIAL = {
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
STATES = 16
PLAN_SHAPES = ((8, 1536, 2048), (1, 1536, 2048), (64, 1536, 512), (1, 1536, 32768))


def scan_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Inputs (batch, d_inner, seqlen) in the range of a trained model: x, delta, A, B, C, D, z, delta_bias."""
    batch, d_inner, seqlen = shape
    g = torch.Generator(device="cuda").manual_seed(seqlen)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    A = -torch.arange(1, STATES + 1, device="cuda").float().repeat(d_inner, 1) * torch.exp(0.1 * normal(d_inner, 1))
    rows = [normal(batch, seqlen, d_inner).to(dtype) for _ in range(3)]
    B, C = (normal(batch, seqlen, STATES).to(dtype) for _ in range(2))
    return rows[0], rows[1], A, B, C, normal(d_inner), rows[2], normal(d_inner) - 4.0


def eager_ms(run: Callable[[], Any], budget_ms: float = 40.0) -> float:
    """Median time of one call over about ``budget_ms`` of work."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    count = max(5, min(50, int(budget_ms / max(start.elapsed_time(end), 1e-3))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def graph_ms(run: Callable[[], Any]) -> float:
    """Median time of a replay of ``run`` captured as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return eager_ms(graph.replay)


def calls(
    shape: tuple[int, int, int], plans: tuple[Plan | None, Plan | None] = (None, None)
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward as in inference (no saved states), and forward + backward."""
    given = scan_inputs(shape)
    grad_y = torch.randn_like(given[0])

    def both() -> None:
        _, _, chunks = scan.forward(*given, True, None, None, True, plan=plans[0])
        scan.backward(grad_y, None, *given, True, None, None, chunks, plan=plans[1])

    return lambda: scan.forward(*given, True, None, None, False, plan=plans[0]), both


def time_scan(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Times, peak memory of forward + backward, and the official kernel's times."""
    forward, both = calls(shape)
    row = {"shape": shape, "forward_ms": graph_ms(forward), "both_ms": graph_ms(both),
           "forward_eager_ms": eager_ms(forward)}  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    row |= {"both_eager_ms": eager_ms(both), "peak_bytes": torch.cuda.max_memory_allocated()}
    batch, d_inner, seqlen = shape
    row["exp_limit_ms"] = batch * d_inner * seqlen * STATES / 3.7e9
    return row | ({"official_ms": OFFICIAL[shape]} if shape in OFFICIAL else {})


def errors_of_gate() -> dict[str, float]:
    """Errors of outputs and gradients against the float64 reference, beside those of bf16 rounding alone."""
    given = scan_inputs((2, 256, 512))
    grad_y = torch.randn_like(given[0])
    leaves = [t.double().requires_grad_() for t in given]
    y, state = selective_scan_ref(*leaves[:7], delta_bias=leaves[7])
    wanted = (y, state, *torch.autograd.grad(y, leaves, grad_y.double()))
    got_y, got_state, chunks = scan.forward(*given, True, None, None, True)
    got = (got_y, got_state, *scan.backward(grad_y, None, *given, True, None, None, chunks)[:8])
    names = ("y", "final_state", "x", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, got, wanted, strict=True)}


def candidates(seqlen: int) -> tuple[list[Plan], list[Plan]]:
    """Launches of the forward and the backward kernel worth comparing."""
    segments = sorted({min(seqlen, s) for s in (256, 512, 2048, 8192, 1 << 20)})
    forward = [Plan(*n, s) for s in segments for n in ((4, 1, 32, 1), (4, 1, 16, 1), (8, 1, 32, 1), (4, 1, 32, 4),
                                                       (4, 2, 16, 1), (8, 1, 16, 1))]  # fmt: skip
    backward = [Plan(*n, s) for s in segments for n in ((4, 1, 16, 1), (4, 1, 16, 3), (4, 2, 8, 1), (4, 2, 8, 3),
                                                        (8, 1, 16, 1), (2, 2, 8, 4))]  # fmt: skip
    return forward, backward


def time_plans(shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Graph times of every candidate: the forward ones alone, the backward ones less the time of a forward."""
    rows = []
    given = scan_inputs(shape)
    grad_y = torch.randn_like(given[0])
    _, _, chunks = scan.forward(*given, True, None, None, True)
    for plan in candidates(shape[2])[0]:
        ms = graph_ms(lambda plan=plan: scan.forward(*given, True, None, None, True, plan=plan))
        rows.append({"shape": shape, "kernel": "forward", "plan": dataclasses.astuple(plan), "ms": ms})
    for plan in candidates(shape[2])[1]:
        ms = graph_ms(lambda plan=plan: scan.backward(grad_y, None, *given, True, None, None, chunks, plan=plan))
        rows.append({"shape": shape, "kernel": "backward", "plan": dataclasses.astuple(plan), "ms": ms})
    return rows


def compile_ahead(run: Callable[[], Any]) -> None:
    """Compile on all cores what ``run`` would compile one by one: it runs once with launches left out."""
    wanted: set[nvrtc.Program] = set()
    real = nvrtc.Program.kernel

    def note(program: nvrtc.Program, name: str, shared_bytes: int = 0) -> Callable[..., None]:
        wanted.add(program)
        return lambda *_: None

    nvrtc.Program.kernel = note  # type: ignore[method-assign, assignment]
    try:
        run()
    finally:
        nvrtc.Program.kernel = real  # type: ignore[method-assign]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(nvrtc.machine_code, wanted))


def kernel_times(shape: tuple[int, int, int]) -> dict[str, float]:
    """Microseconds of each kernel of one forward + backward."""
    from torch.profiler import ProfilerActivity, profile

    _, both = calls(shape)
    both()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        both()
        torch.cuda.synchronize()
    return {e.key[:50]: round(e.device_time_total, 1) for e in trace.key_averages() if e.device_time_total > 0}


def time_conv(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Graph times of the convolution in bf16 with bias and silu."""
    batch, d_inner, seqlen = shape
    x = torch.randn(batch, seqlen, 2 * d_inner, device="cuda", dtype=torch.bfloat16)[..., :d_inner]
    weight, bias = torch.randn(d_inner, 4, device="cuda"), torch.randn(d_inner, device="cuda")
    grad = torch.randn(batch, seqlen, d_inner, device="cuda", dtype=torch.bfloat16)
    return {
        "shape": shape,
        "forward_ms": graph_ms(lambda: conv.forward(x, weight, bias, True, None, None)),
        "backward_ms": graph_ms(lambda: conv.backward(grad, None, x, weight, bias, True, None, None)),
    }


def copy_bandwidth() -> float:
    """TB/s, bytes read and written."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / eager_ms(lambda: b.copy_(a)) / 1e9


def main() -> None:
    """Gate, time, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--plans", action="store_true", help="also compare launches")
    options = parser.parse_args()
    watch = Stopwatch()
    results: dict[str, Any] = {"errors": errors_of_gate(), "copy_tb_per_s": copy_bandwidth(), "plans": []}
    print(results, flush=True)
    if not max(results["errors"].values()) < 1e-2:  # also for NaN
        raise SystemExit("wrong results: nothing is timed")
    print("implementation:", scan.implementation(torch.empty(1, 1, 1, device="cuda"), STATES), flush=True)
    if options.plans:
        for shape in PLAN_SHAPES:
            compile_ahead(lambda shape=shape: [f() for f in _untimed(shape)])
            print(f"compiled {shape}, {watch.seconds:.0f} s", flush=True)
            rows = time_plans(shape)
            results["plans"] += rows
            for kernel in ("forward", "backward"):
                best = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: r["ms"])
                print(shape, kernel, " ".join(f"{r['plan']}:{r['ms']:.3f}" for r in best), flush=True)
    results["scan"] = [time_scan(shape) for shape in (*OFFICIAL, (256, 512, 512))]
    results["kernels"] = {str(shape): kernel_times(shape) for shape in PLAN_SHAPES}
    results["conv"] = [time_conv(shape) for shape in ((8, 1536, 2048), (256, 512, 512))]
    print(results["kernels"], results["conv"], sep="\n")
    for row in results["scan"]:
        forward, both = row.get("official_ms", (float("nan"),) * 2)
        print(f"{row['shape']!s:18} fwd {row['forward_ms']:7.3f} ms {forward / row['forward_ms']:5.2f}x (eager "
              f"{row['forward_eager_ms']:7.3f})  fwd+bwd {row['both_ms']:7.3f} ms {both / row['both_ms']:5.2f}x (eager "
              f"{row['both_eager_ms']:7.3f})  exp limit {row['exp_limit_ms']:.3f}  {row['peak_bytes'] / 2**20:.0f} MiB",
              flush=True)  # fmt: skip
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"gpu-ops-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{name}.json"
    write_record(
        path, watch.record("bench", "selective scan and convolution on a GPU", {"plans": options.plans}, results)
    )
    print(path, f"{watch.seconds:.0f} s")


def _untimed(shape: tuple[int, int, int]) -> list[Callable[[], Any]]:
    """One call of every candidate on inputs of this shape."""
    given = scan_inputs(shape)
    chunks = torch.empty(0, device="cuda")
    forward, backward = candidates(shape[2])
    return [
        *(lambda p=p: scan.forward(*given, True, None, None, True, plan=p) for p in forward),
        *(lambda p=p: scan.backward(given[0], None, *given, True, None, None, chunks, plan=p) for p in backward),
    ]


if __name__ == "__main__":
    main()
