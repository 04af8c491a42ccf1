"""Time training steps and prefill of random models on a GPU: tokens a second, peak memory, and where the time goes.

Run from the repository, all bars in one run: ``PYTHONPATH=. python benchmarks/gpu_training.py --out benchmarks
graph:130m:8x2048 graph:370m:8x2048 graph:1.4b:4x2048 lora-graph:1.4b:4x2048 lora-graph:2.8b:2x2048
prefill:1.4b:32x2048``. Training is forward and backward without an optimiser step, float32 weights under bfloat16
autocast: ``train`` all weights, ``lora`` as ``finetune --method lora`` attaches it and holds what is frozen
(`mambacus.tuning.frozen`), each as it is or (``graph``, ``lora-graph``) replayed as a CUDA graph; prefill is one pass
in bfloat16 with the logits of the last token. After the shape may follow how the scan's backward pass shall run:
``graph:1.4b:4x2048:again`` sums over the states again in place of reading y, ``kept`` reads it whatever is trained,
``two-sets`` takes two sets of channels a block. Writes one JSON record named by date and GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mambacus.measuring.timing import captured
from mambacus.models import load
from mambacus.ops.selective_scan import gpu, gpu_cuda
from mambacus.runtime.records import Stopwatch, write_record
from mambacus.tuning import frozen
from mambacus.tuning.methods import AdapterSettings, find_method

DEVICE = torch.device("cuda")


def step_of(kind: str, name: str, batch: int, seqlen: int) -> Callable[[], Any]:
    """Return what is timed; memory counts from the loaded model on."""
    loaded, _ = load(f"random:{name}", device=DEVICE, dtype=torch.bfloat16 if kind == "prefill" else torch.float32)
    ids = torch.randint(2, 50000, (batch, seqlen), device=DEVICE)
    lora, graph = kind.startswith("lora"), kind.endswith("graph")
    model: Any = find_method("lora").attach(loaded, AdapterSettings(rank=16)) if lora else loaded
    if frozen.choose(model, DEVICE, torch.bfloat16).used:
        frozen.FrozenWeights(model).__enter__()  # to the end of the case
    torch.cuda.reset_peak_memory_stats()

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=not graph):
            loss = model(input_ids=ids, labels=ids, loss_only=True).loss
        loss.backward()

    @torch.inference_mode()
    def prefill() -> None:
        model(ids, logits_at=torch.full((batch, 1), seqlen - 1, device=DEVICE))

    if kind == "prefill":
        return prefill
    model.train()
    return captured(train) if graph else train


def run_scan(how: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the scan's backward pass runs as the module's text says."""
    if how in ("again", "kept"):
        return mock.patch.object(gpu, "keeps_output", lambda *_: how == "kept")
    if how == "two-sets":
        choose = gpu_cuda.backward_plan
        return mock.patch.object(gpu_cuda, "backward_plan", lambda *of: choose(*of, most_sets=2))
    raise ValueError(f"case: expected again, kept or two-sets after the shape, got {how!r}")


def measure(case: str, kernels: int) -> dict[str, Any]:
    """Return the figures of one case: median of ten runs, the time until all work was queued, peak memory, kernels."""
    kind, name, shape, *hows = case.split(":")
    with contextlib.ExitStack() as stack:
        for how in hows:
            stack.enter_context(run_scan(how))
        return measure_step(case, kind, name, shape, kernels)


def measure_step(case: str, kind: str, name: str, shape: str, kernels: int) -> dict[str, Any]:
    """Return what `measure` does, of the parts of a case."""
    batch, seqlen = (int(size) for size in shape.split("x"))
    step = step_of(kind, name, batch, seqlen)
    step()
    samples = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start, queued))
    peak = torch.cuda.max_memory_allocated()
    seconds, queued = sorted(samples)[len(samples) // 2]
    found = profile(step)
    return {
        "case": case, "ms": round(1e3 * seconds, 2), "queued_ms": round(1e3 * queued, 2),
        "tokens_per_second": round(batch * seqlen / seconds), "peak_gib": round(peak / 2**30, 2),
        "busy_ms": round(sum(row["ms"] for row in found), 2), "launches": sum(row["calls"] for row in found),
        "kernels": found[:kernels],
    }  # fmt: skip


def profile(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the kernels of one step, the longest in total first: name, number of calls, milliseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace_kernels

    with trace_kernels(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = [event for event in trace.key_averages() if event.device_time_total > 0]
    events.sort(key=lambda event: -event.device_time_total)
    return [{"name": e.key[:100], "calls": e.count, "ms": round(e.device_time_total / 1e3, 3)} for e in events]


def main() -> None:
    """Measure every case, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--kernels", type=int, default=30)
    options = parser.parse_args()
    watch = Stopwatch()
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"gpu-training-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{name}.json"
    rows = []
    for case in options.cases:
        try:
            rows.append(measure(case, options.kernels))
        except RuntimeError as error:  # the other cases are worth having
            print(case, "failed:", error, flush=True)
            continue
        print({key: value for key, value in rows[-1].items() if key != "kernels"}, f"{watch.seconds:.0f} s", flush=True)
        for row in rows[-1]["kernels"]:
            print(f"{row['ms']:8.3f} ms {row['calls']:5d} x {row['name']}")
        gc.collect()
        torch.cuda.empty_cache()
        write_record(path, watch.record("bench", "training and prefill on a GPU", vars(options), {"rows": rows}))


if __name__ == "__main__":
    main()
