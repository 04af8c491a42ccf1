"""Check and time the Triton kernels on a GPU: every case against the float64 reference, then the shapes of the table.

Run from the repository: ``PYTHONPATH=. python benchmarks/gpu_ops.py --out benchmarks/``. Writes one JSON record named by
date and GPU, and prints a table. Times are medians over CUDA events; no time is reported if a check fails.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mambacus.ops.causal_conv1d import gpu as conv_gpu
from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref
from mambacus.ops.selective_scan import gpu
from mambacus.ops.selective_scan.reference import selective_scan_ref, selective_state_update_ref
from mambacus.runtime.records import Stopwatch, write_record

# Median ms of mamba-ssm's CUDA kernel (forward, forward + backward), bf16, d_state 16, on an H100 80GB HBM3
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
SCAN_NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def scan_inputs(
    batch: int, seqlen: int, d_inner: int, d_state: int, dtype: torch.dtype, *, strided: bool = False
) -> dict[str, Tensor | None]:
    """Random inputs in the range of a trained model; ``strided`` makes x and z halves of one tensor, B and C of another."""
    g = torch.Generator(device="cuda").manual_seed(batch * seqlen + d_inner + d_state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    xz, bc = normal(batch, seqlen, 2 * d_inner).to(dtype), normal(batch, seqlen, 2 * d_state).to(dtype)
    x, z = xz.chunk(2, dim=-1)
    B, C = bc.chunk(2, dim=-1)
    if not strided:
        x, z, B, C = (t.contiguous() for t in (x, z, B, C))
    A = -torch.arange(1, d_state + 1, device="cuda").float().repeat(d_inner, 1) * torch.exp(0.1 * normal(d_inner, 1))
    return dict(x=x, delta=normal(batch, seqlen, d_inner).to(dtype), A=A, B=B, C=C, D=normal(d_inner), z=z,
                delta_bias=normal(d_inner) - 4.0, initial_state=normal(batch, d_inner, d_state))  # fmt: skip


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN counts as infinite."""
    error = ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def poisoned(run: Any) -> Any:
    """Run with every empty tensor filled with NaN, so that an element that was not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


def document_ids(batch: int, seqlen: int) -> Tensor:
    """Ids with documents of random length, padding left and right in turn, and one row of padding alone."""
    g = torch.Generator().manual_seed(seqlen)
    ids = (torch.rand(batch, seqlen, generator=g) < 0.05).int().cumsum(1)
    for row in range(batch):
        if row % 3 == 1:
            ids[row, : seqlen // 4] = -1
        if row % 3 == 2:
            ids[row, seqlen - seqlen // 3 :] = -1
    if batch > 3:
        ids[3] = -1
    return ids.cuda()


def check_scan(
    shape: tuple[int, int, int, int], dtype: torch.dtype, absent: tuple[str, ...] = (), *, packed: bool = False,
    softplus: bool = True, strided: bool = False, grad_final: bool = True,
    plans: tuple[gpu.Plan | None, gpu.Plan | None] = (None, None),
) -> dict[str, Any]:  # fmt: skip
    """Compare outputs, final state and every gradient with the float64 reference."""
    batch, seqlen, d_inner, d_state = shape
    inputs = scan_inputs(*shape, dtype, strided=strided)
    inputs.update(dict.fromkeys(absent))
    if not softplus:
        inputs["delta"] = (inputs["delta"].abs() * 0.1).to(dtype)
    seq = document_ids(batch, seqlen) if packed else None
    grad_y = torch.randn(batch, seqlen, d_inner, device="cuda").to(dtype)
    grad_state = torch.randn(batch, d_inner, d_state, device="cuda") if grad_final else None

    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    named = dict(delta_bias=leaves["delta_bias"], delta_softplus=softplus, seq_idx=seq)
    y, final = selective_scan_ref(*(leaves[k] for k in SCAN_NAMES[:7]), **named, initial_state=leaves["initial_state"])
    outputs = [y, final] if grad_final else [y]
    grads = torch.autograd.grad(
        outputs, [v for v in leaves.values() if v is not None],
        [grad_y.double(), grad_state.double()] if grad_final else [grad_y.double()],
    )  # fmt: skip
    truth = dict(zip((k for k, v in leaves.items() if v is not None), grads, strict=True))

    given = tuple(inputs[k] for k in SCAN_NAMES[:8])

    def run() -> dict[str, Tensor]:
        got, state, chunks = gpu.forward(*given, softplus, seq, inputs["initial_state"], True, plan=plans[0])
        back = gpu.backward(
            grad_y, grad_state, *given, softplus, seq, inputs["initial_state"], chunks, plan=plans[1]
        )  # fmt: skip
        return {"y": got, "final_state": state, **dict(zip(SCAN_NAMES, back, strict=True))}

    first, second = poisoned(run), run()
    errors = {k: relative_error(first[k], v) for k, v in {"y": y, "final_state": final, **truth}.items()}
    return {
        "op": "selective_scan", "shape": shape, "dtype": str(dtype), "absent": absent, "packed": packed, "errors": errors,
        "deterministic": all(torch.equal(first[k], second[k]) for k in errors), "ok": max(errors.values()) < BOUND[dtype],
    }  # fmt: skip


def check_conv(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, packed: bool = False, initial: bool = True, bias: bool = True,
    silu: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Compare the convolution's outputs, final state and every gradient with the float64 reference."""
    batch, seqlen, d_inner, width = shape
    torch.manual_seed(seqlen)
    x = torch.randn(batch, seqlen, 2 * d_inner, device="cuda").to(dtype)[..., :d_inner]
    inputs = [x, torch.randn(d_inner, width, device="cuda"), torch.randn(d_inner, device="cuda") if bias else None,
              torch.randn(batch, d_inner, width, device="cuda").to(dtype) if initial else None]  # fmt: skip
    seq = document_ids(batch, seqlen) if packed else None
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs]
    grad_y, grad_state = torch.randn_like(x), torch.randn(batch, d_inner, width, device="cuda").to(dtype)
    y, final = causal_conv1d_ref(*leaves[:3], activation="silu" if silu else None, seq_idx=seq, initial_state=leaves[3])
    kept = [t for t in leaves if t is not None]
    truth = iter(torch.autograd.grad([y, final], kept, [grad_y.double(), grad_state.double()]))
    got, state = poisoned(lambda: conv_gpu.forward(*inputs[:3], silu, seq, inputs[3]))
    grads = poisoned(lambda: conv_gpu.backward(grad_y, grad_state, *inputs[:3], silu, seq, inputs[3]))
    errors = {"y": relative_error(got, y), "final_state": relative_error(state, final)}
    for name, given, grad in zip(("x", "weight", "bias", "initial_state"), inputs, grads, strict=True):
        if given is not None:
            errors[name] = relative_error(grad, next(truth))
    return {"op": "causal_conv1d", "shape": shape, "dtype": str(dtype), "packed": packed, "errors": errors,
            "ok": max(errors.values()) < BOUND[dtype]}  # fmt: skip


def check_updates(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Compare both one-token updates with their references in float64."""
    i = {k: v if v is None or v.dim() < 3 or k == "initial_state" else v[:, 0] for k, v in
         scan_inputs(3, 1, 100, 17, dtype).items()}  # fmt: skip
    order = (i["initial_state"], *(i[k] for k in SCAN_NAMES[:7]))
    wide = [t.double() for t in order]
    want = selective_state_update_ref(*wide, delta_bias=i["delta_bias"].double())
    got = gpu.update(*order, i["delta_bias"], True)
    errors = {"y": relative_error(got[0], want[0]), "state": relative_error(got[1], want[1])}
    x, state = torch.randn(3, 100, device="cuda").to(dtype), torch.randn(3, 100, 4, device="cuda").to(dtype)
    weight, bias = torch.randn(100, 4, device="cuda"), torch.randn(100, device="cuda")
    want = causal_conv1d_update_ref(x.double(), state.double(), weight.double(), bias.double())
    got = conv_gpu.update(x, state, weight, bias, True)
    conv = {"y": relative_error(got[0], want[0]), "state": relative_error(got[1], want[1])}
    return [
        {"op": op, "dtype": str(dtype), "errors": e, "ok": max(e.values()) < BOUND[dtype]}
        for op, e in (("selective_state_update", errors), ("causal_conv1d_update", conv))
    ]


def all_checks() -> list[dict[str, Any]]:
    """Run every correctness case."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    cut = (gpu.Plan(64, 16, 128), gpu.Plan(64, 8, 128))
    rows = [check_scan((2, 300, 96, 16), dtype) for dtype in (f32, bf16, f16)]
    rows += [check_scan((5, 300, 70, 16), dtype, packed=True, strided=True) for dtype in (f32, bf16)]
    rows += [check_scan((5, 300, 70, 16), f32, packed=True, strided=True, plans=cut)]
    rows += [check_scan((2, 300, 70, 5), f32, plans=cut), check_scan((1, 517, 33, 17), f32)]
    rows += [check_scan((2, 65, 40, 1), f32), check_scan((2, 140, 40, 130), f32), check_scan((1, 1, 64, 16), f32)]
    rows += [check_scan((2, 100, 64, 16), f32, (name,)) for name in ("D", "z", "delta_bias", "initial_state")]
    rows += [check_scan((2, 100, 64, 16), f32, ("D", "z", "delta_bias", "initial_state"), grad_final=False)]
    rows += [check_scan((2, 100, 64, 16), f32, ("delta_bias",), softplus=False)]
    for dtype, packed in itertools.product((f32, bf16, f16), (False, True)):
        rows.append(check_conv((5, 300, 70, 4), dtype, packed=packed))
    rows += [check_conv((5, 300, 70, 4), f32, packed=True, initial=False), check_conv((2, 2, 30, 4), f32)]
    rows += [check_conv((2, 40, 30, 3), f32, silu=False, bias=False), check_conv((5, 9, 30, 5), f32, packed=True)]
    return rows + check_updates(f32) + check_updates(bf16)


def median_ms(run: Any, budget_ms: float = 40.0) -> float:
    """Median time of one call, after a warm-up, over about ``budget_ms`` of work."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    count = max(5, min(60, int(budget_ms / max(start.elapsed_time(end), 1e-3))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def time_scan(
    shape: tuple[int, int, int], plans: tuple[gpu.Plan | None, gpu.Plan | None] = (None, None), d_state: int = 16
) -> dict[str, Any]:
    """Time forward (without saved states, as in inference) and forward + backward in bf16, D, z, bias and softplus."""
    batch, d_inner, seqlen = shape
    i = scan_inputs(batch, seqlen, d_inner, d_state, torch.bfloat16)
    given = tuple(i[k] for k in SCAN_NAMES[:8])
    grad_y = torch.randn_like(i["x"])

    def both() -> None:
        _, _, chunks = gpu.forward(*given, True, None, None, True, plan=plans[0])
        gpu.backward(grad_y, None, *given, True, None, None, chunks, plan=plans[1])

    forward = median_ms(lambda: gpu.forward(*given, True, None, None, False, plan=plans[0]))
    torch.cuda.reset_peak_memory_stats()
    result = {"shape": shape, "plans": [None if p is None else vars(p) for p in plans], "forward_ms": forward,
              "both_ms": median_ms(both), "peak_bytes": torch.cuda.max_memory_allocated()}  # fmt: skip
    if shape in OFFICIAL and d_state == 16:
        result["official_ms"] = OFFICIAL[shape]
    return result


def kernel_times(shape: tuple[int, int, int]) -> dict[str, float]:
    """Microseconds of every kernel of one forward + backward."""
    batch, d_inner, seqlen = shape
    i = scan_inputs(batch, seqlen, d_inner, 16, torch.bfloat16)
    given = tuple(i[k] for k in SCAN_NAMES[:8])
    grad_y = torch.randn_like(i["x"])
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            _, _, chunks = gpu.forward(*given, True, None, None, True)
            gpu.backward(grad_y, None, *given, True, None, None, chunks)
            torch.cuda.synchronize()
    return {event.key[:60]: round(event.device_time_total, 1) for event in trace.key_averages()}


def time_conv(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Time the convolution in bf16 with bias and silu."""
    batch, d_inner, seqlen = shape
    x = torch.randn(batch, seqlen, 2 * d_inner, device="cuda", dtype=torch.bfloat16)[..., :d_inner]
    weight, bias = torch.randn(d_inner, 4, device="cuda"), torch.randn(d_inner, device="cuda")
    grad = torch.randn(batch, seqlen, d_inner, device="cuda", dtype=torch.bfloat16)
    return {
        "shape": shape,
        "forward_ms": median_ms(lambda: conv_gpu.forward(x, weight, bias, True, None, None)),
        "backward_ms": median_ms(lambda: conv_gpu.backward(grad, None, x, weight, bias, True, None, None)),
    }


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s, bytes read and written."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return {"copy_tb_per_s": 2 * a.nbytes / median_ms(lambda: b.copy_(a)) / 1e9}


def main() -> None:
    """Check, time, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--plans", action="store_true", help="also time other launches of the scan on some shapes")
    out = parser.parse_args().out
    watch = Stopwatch()
    checks = all_checks()
    for row in checks:
        if not row["ok"] or not row.get("deterministic", True):
            print("WRONG", row, flush=True)
    worst = {d: max(max(r["errors"].values()) for r in checks if r["dtype"] == d) for d in {r["dtype"] for r in checks}}
    print(f"{sum(r['ok'] for r in checks)} of {len(checks)} checks right; worst relative errors {worst}; "
          f"{watch.seconds:.0f} s", flush=True)  # fmt: skip
    results: dict[str, Any] = {"checks": checks, "ceilings": ceilings(), "scan": [], "plans": [], "conv": []}
    for shape, (fwd, both) in OFFICIAL.items():
        row = time_scan(shape)
        results["scan"].append(row)
        print(f"{shape!s:22} fwd {row['forward_ms']:7.3f} ({fwd / row['forward_ms']:.2f}x)  fwd+bwd {row['both_ms']:7.3f} "
              f"({both / row['both_ms']:.2f}x)  {row['peak_bytes'] / 2**20:.0f} MiB", flush=True)  # fmt: skip
    results["training"] = time_scan((256, 512, 512))
    print("training 256 x 512 tokens, d_inner 512:", results["training"], flush=True)
    for shape in ((8, 1536, 2048), (1, 1536, 2048)):
        results[f"kernels {shape}"] = kernel_times(shape)
        print(shape, results[f"kernels {shape}"], flush=True)
    results["conv"] = [time_conv(shape) for shape in ((8, 1536, 2048), (256, 512, 512))]
    print(results["conv"], results["ceilings"], flush=True)
    if results and parser.parse_args().plans:
        for shape in ((8, 1536, 2048), (1, 1536, 2048), (64, 1536, 512)):
            for block, tile, segment in itertools.product((64, 128), (4, 8, 16), (128, 256, 512, 1024, 2048)):
                if segment > shape[2] or (block == 128 and tile == 16):
                    continue
                plan = gpu.Plan(block, tile, segment)
                row = time_scan(shape, (plan, plan))
                results["plans"].append(row)
                print(f"{shape} block {block} tile {tile} segment {segment}: fwd {row['forward_ms']:.3f} "
                      f"fwd+bwd {row['both_ms']:.3f}", flush=True)  # fmt: skip
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = out / f"gpu-ops-{datetime.date.today():%Y-%m-%d}-{name}.json"
    write_record(path, watch.record("bench", "triton kernels", {"plans": "see results"}, results))
    print(path, f"{watch.seconds:.0f} s, triton {triton.__version__}", flush=True)
    if not all(row["ok"] and row.get("deterministic", True) for row in checks):
        raise SystemExit("a check failed: the times above do not count")


if __name__ == "__main__":
    main()
