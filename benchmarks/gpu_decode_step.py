"""Check and time the fused one-token step on a GPU: a step, its kernels, and the engine from end to end.

Run from the repository: ``PYTHONPATH=. python benchmarks/gpu_decode_step.py --out benchmarks``, with cases to choose:
``check:130m:8`` holds a step of 8 rows of a random model to float64, beside the step of the model's modules;
``step:1.4b:8`` times a step as the decoder replays it, fused and not, and its kernels; from 49 rows on with x_proj,
dt_proj and norms in own kernels or in none; ``kernels:1.4b:8`` times each
kernel alone over all layers, with several tilings and torch's product beside it; ``engine:1.4b:8:2048:128`` times
`Engine.generate` of 8 prompts of 2048 tokens and 128 new ones; ``prefill:1.4b:8:16`` times reading 8 prompts of 16
tokens, as it is and from a graph, and says where the host's time goes; ``host:130m:1:16:256`` tells what a decoded
token costs the host, greedy and drawn, and how long it waited for the GPU. Writes one JSON record named by date and
GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import functools
import gc
import os
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.inference.fused import step_weights
from mambacus.inference.prompt_passes import PromptPasses
from mambacus.inference.scheduler import _Block
from mambacus.measuring.timing import captured, ceilings, time_ms
from mambacus.models import MambaLM, MambaState, load
from mambacus.ops.decode_step import LayerWeights, StepWeights, decode_step, gpu
from mambacus.ops.decode_step.reference import decode_step_ref
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Stopwatch, write_record

DEVICE = torch.device("cuda")
FEW_ROWS, AHEAD, AHEAD_ROWS, FUSED_ROWS = gpu.FEW_ROWS, gpu.AHEAD, gpu.AHEAD_ROWS, gpu.FUSED_ROWS
SHORT = [f"engine:1.4b:{rows}:16:256" for rows in (1, 64, 512)] + ["engine:130m:1:16:256"]
LONG = [f"engine:1.4b:{rows}:2048:128" for rows in (1, 8, 32, 128)]
STEPS = ["step:130m:1"] + [f"step:1.4b:{rows}" for rows in (1, 8, 16, 32, 64, 128, 512)]
CHECKS = ["check:130m:1", "check:130m:8", "check:130m:20", "check:130m:64", "check:1.4b:1", "check:1.4b:32"]
KERNELS = [f"kernels:1.4b:{rows}" for rows in (1, 8, 16, 32, 64, 128, 512)] + ["kernels:130m:1"]
PREFILLS = [f"prefill:1.4b:{rows}:16" for rows in (1, 64, 512)] + ["prefill:130m:1:16"]
PREFILLS += [f"prefill:1.4b:1:{tokens}" for tokens in (17, 1500, 2048, 4096)]
HOSTS = [f"host:130m:{rows}:16:256" for rows in (1, 64)]
CASES = [*CHECKS, *STEPS, *KERNELS, *PREFILLS, *LONG, *SHORT, *HOSTS]
RULES: dict[str, list[dict[str, Any]]] = {  # how rows choose their tokens, in turn
    "greedy": [{}], "temperature": [{"temperature": 0.8}], "top_p": [{"temperature": 0.8, "top_p": 0.95}],
    "penalty": [{"repetition_penalty": 1.2}], "greedy and temperature": [{}, {"temperature": 0.8}],
}  # fmt: skip
TILINGS = {  # tiles of 16 outputs, warps, ring, blocks of a multiprocessor; by tiles of 8 rows
    1: [(1, 8, 8, 2), (1, 8, 4, 4), (1, 4, 8, 4), (2, 8, 4, 2), (1, 16, 8, 1), (2, 4, 8, 2)],
    8: [(1, 8, 2, 1), (1, 16, 2, 1), (2, 8, 2, 1), (4, 8, 1, 1)],
    2: [(1, 8, 6, 2), (2, 8, 3, 2), (2, 8, 4, 1), (4, 8, 2, 1), (1, 16, 4, 1)],
    4: [(1, 8, 4, 2), (1, 16, 4, 1), (2, 8, 3, 1), (4, 8, 2, 1)],
}


@functools.lru_cache(maxsize=1)
def model_of(name: str) -> MambaLM:
    """Return a random model in bfloat16."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model, _ = load(f"random:{name}", device=DEVICE, dtype=torch.bfloat16)
    return model.eval()


def weights_of(name: str) -> StepWeights:
    """Return its weights."""
    weights = step_weights(model_of(name))
    assert not isinstance(weights, str), weights
    return weights


@contextmanager
def kernels_of(which: str) -> Iterator[None]:
    """Choose the fused step (``cuda``) or the model's modules (``triton``)."""
    before = os.environ.get("MAMBACUS_GPU_KERNELS")
    os.environ["MAMBACUS_GPU_KERNELS"] = which
    try:
        yield
    finally:
        os.environ.pop("MAMBACUS_GPU_KERNELS")
        if before is not None:
            os.environ["MAMBACUS_GPU_KERNELS"] = before


def states(model: MambaLM, rows: int) -> MambaState:
    """Return the states after eight random tokens of each row."""
    ids = torch.randint(2, 50000, (rows, 8), generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    with torch.inference_mode():
        return model(ids, logits_at=torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)).state


def in_float64(weights: StepWeights) -> StepWeights:
    """Return the same numbers in float64."""
    layers = tuple(LayerWeights(*(None if t is None else t.double() for t in layer)) for layer in weights.layers)
    return StepWeights(weights.embedding.double(), layers, weights.norm_f.double(), weights.head.double(), weights.eps)


@torch.inference_mode()
def check(name: str, rows: int) -> dict[str, Any]:
    """Return the errors of a fused step and of the model's modules against float64, relative to the norm."""
    model, weights = model_of(name), weights_of(name)
    state = states(model, rows)
    tokens = torch.randint(2, 50000, (rows,), device=DEVICE)
    exact = decode_step_ref(in_float64(weights), tokens, state.conv_state.double(), state.ssm_state.double())
    out = model(tokens[:, None], state=state)
    got = [state.conv_state.clone(), state.ssm_state.clone(), state.tokens.clone()]
    logits = decode_step(weights, tokens, *got, backend="cuda")
    twice = [state.conv_state.clone(), state.ssm_state.clone(), state.tokens.clone()]
    repeats = torch.equal(logits, decode_step(weights, tokens, *twice, backend="cuda"))
    repeats = repeats and all(torch.equal(a, b) for a, b in zip(got, twice, strict=True))
    results: dict[str, Any] = {"same_bits_twice": repeats, "counted": torch.equal(got[2], state.tokens + 1)}
    modules = (out.logits[:, 0], out.state.conv_state, out.state.ssm_state)
    for what, fused, unfused, true in zip(
        ("logits", "conv_state", "ssm_state"), (logits, *got[:2]), modules, exact, strict=True
    ):
        errors = [((t.double() - true).norm() / true.norm()).item() for t in (fused, unfused)]
        results[what] = {"fused": errors[0], "modules": errors[1]}
        results["right"] = results.get("right", repeats) and errors[0] <= 1.5 * errors[1]
    results["same_argmax"] = (logits.argmax(-1) == exact[0].argmax(-1)).float().mean().item()
    return results


def floor_bytes(weights: StepWeights, rows: int) -> int:
    """Return the bytes a step must move: every weight once, the states read and written."""
    tensors = [t for layer in weights.layers for t in layer if t is not None] + [weights.norm_f, weights.head]
    d_inner, d_state = weights.layers[0].A_log.shape
    return sum(t.nbytes for t in tensors) + 2 * rows * len(weights.layers) * d_inner * (4 * d_state + 8)


@torch.inference_mode()
def step(name: str, rows: int, copy_gb_s: float) -> dict[str, Any]:
    """Return the milliseconds of a step: the graph alone, and as the decoder runs it with the host's part."""
    model = model_of(name)
    results: dict[str, Any] = {"floor_ms": floor_bytes(weights_of(name), rows) / copy_gb_s / 1e6}
    tokens = torch.randint(2, 50000, (rows,), device=DEVICE)
    nothing = dict.fromkeys(AHEAD, 0)
    ways = {
        "few": (rows, AHEAD, AHEAD_ROWS), "few, no prefetch": (rows, nothing, rows),
        "few, prefetch of out_proj": (rows, nothing | {"in": AHEAD["in"]}, rows), "few, prefetch": (rows, AHEAD, rows),
        "many": (0, AHEAD, AHEAD_ROWS), "modules": (0, AHEAD, AHEAD_ROWS),
    }  # fmt: skip
    if rows > 48:
        ways["many, own kernels"] = ways["many"]
    if rows > 64:
        ways = {label: way for label, way in ways.items() if "few" not in label}
    if rows < 16:
        del ways["many"]
    for label, (gpu.FEW_ROWS, gpu.AHEAD, gpu.AHEAD_ROWS) in ways.items():
        gpu.product_launch.cache_clear()
        gpu.FUSED_ROWS = rows if label == "many, own kernels" else 0
        with kernels_of("triton" if label == "modules" else "cuda"):
            decoder = Decoder(model, model, rows)
            state = states(model, min(rows, 8))
            for row in range(rows):
                decoder.put(state.narrow(row % state.batch, 1), row, 1)
            began = time.perf_counter()
            decoder.step(tokens)
            torch.cuda.synchronize()
            recorded = time.perf_counter() - began
            [(replay_graph, _)] = decoder._graphs.values()
            assert (decoder.unfused is None) == (label != "modules"), decoder.unfused

            def replay(replay_graph: Any = replay_graph) -> None:
                for _ in range(20):
                    replay_graph()

            graph_ms = statistics.median(time_ms(replay, DEVICE, repeats=7, warmup=2)) / 20
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(20):
                decoder.step(tokens)
            queued = (time.perf_counter() - began) / 20
            torch.cuda.synchronize()
            whole = (time.perf_counter() - began) / 20
            results[label] = {
                "graph_ms": graph_ms, "step_ms": 1e3 * whole, "queued_ms": 1e3 * queued,
                "recording_seconds": recorded, "kernels": profile(replay_graph),
            }  # fmt: skip
        del decoder, replay_graph, replay
        print("  ", label, {k: v for k, v in results[label].items() if k != "kernels"}, flush=True)
        free()
    return results


def profile(replay: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return for each kernel its calls, the sum of its times, and of the times from the end of the kernel before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace_kernels

    replay()
    torch.cuda.synchronize()
    with trace_kernels(activities=[ProfilerActivity.CUDA]) as trace:
        replay()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    end, before = events[0].time_range.start if events else 0, ""
    for event in events:
        key = f"product after {before}" if event.name == "product" else event.name[:90]
        row = rows[key]
        row[0] += 1
        row[1] += event.time_range.end - event.time_range.start
        row[2] += max(0, event.time_range.end - end)
        end, before = max(end, event.time_range.end), event.name[:30]
    ordered = sorted(rows.items(), key=lambda item: -item[1][2])[:14]
    return [{"name": k, "calls": c, "us": round(t, 1), "us_from_end_to_end": round(d, 1)} for k, (c, t, d) in ordered]


def graph_ms(run: Callable[[], Any]) -> float:
    """Return the milliseconds of a run as a CUDA graph."""
    replay = captured(run)

    def several() -> None:
        for _ in range(10):
            replay()

    return statistics.median(time_ms(several, DEVICE, repeats=5, warmup=1)) / 10


@torch.inference_mode()
def kernels(name: str, rows: int) -> list[dict[str, Any]]:
    """Return the microseconds a layer and GB/s of each kernel alone, run over all layers."""
    weights = weights_of(name)
    layers = weights.layers
    shape = gpu.Shape.of(weights, rows)
    found = []

    def add(kernel: str, what: Any, bytes_of_all: int, run: Callable[[], Any], count: int) -> None:
        try:
            ms = graph_ms(run)
        except RuntimeError as error:  # the other tilings are worth having
            found.append({"kernel": kernel, "what": what, "error": str(error)[:300]})
        else:
            us, gb_s = round(1e3 * ms / count, 2), round(bytes_of_all / ms / 1e6)
            found.append({"kernel": kernel, "what": what, "us": us, "gb_s": gb_s})
        print("  ", found[-1], flush=True)

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=DEVICE)

    normed, y = empty(rows, shape.d_model), empty(rows, shape.d_inner)
    xz, mixed = empty(rows, 2 * shape.d_inner), empty(rows, shape.d_inner)
    for kind in ("in", "out", "head"):
        matrices = [weights.head] if kind == "head" else [getattr(layer, f"{kind}_proj") for layer in layers]
        x = y if kind == "out" else normed
        size = sum(matrix.nbytes for matrix in matrices)

        def torch_products(matrices: list[Tensor] = matrices, x: Tensor = x) -> None:
            for matrix in matrices:
                F.linear(x, matrix)

        add(kind, "torch", size, torch_products, len(matrices))
        if rows > 64:
            continue
        tiles = -(-rows // 8)
        chosen = gpu.tiling(kind, len(matrices[0]), rows)
        result = empty(rows, shape.vocabulary, dtype=torch.float32) if kind == "head" else xz
        stream = {"residual": empty(rows, shape.d_model, dtype=torch.float32), "normed": normed.clone(),
                  "squares": empty(rows, 1024, dtype=torch.float32)}  # fmt: skip
        for cut in dict.fromkeys([chosen, *(gpu.Tiling(*numbers) for numbers in TILINGS[tiles])]):
            launch = gpu.product_launch(kind, shape, weights.eps, cut)

            def products(
                matrices: list[Tensor] = matrices, x: Tensor = x, launch: Any = launch, stream: Any = stream,
                result: Tensor = result, kind: str = kind,
            ) -> None:  # fmt: skip
                for matrix in matrices:
                    if kind == "out":
                        launch(weight=matrix, x=x, norm=weights.norm_f, next=layers[0].in_proj, **stream)
                    else:
                        launch(weight=matrix, x=x, squares=stream["squares"], y=result, next=layers[0].out_proj)

            add(kind, {**cut._asdict(), "chosen": cut == chosen}, size, products, len(matrices))
    conv, ssm = (
        empty(len(layers), rows, shape.d_inner, 4),
        empty(len(layers), rows, shape.d_inner, shape.d_state, dtype=torch.float32),
    )
    part = empty(shape.d_inner // shape.slice, rows, shape.outputs, dtype=torch.float32)
    projected, delta = empty(rows, shape.outputs), empty(rows, shape.d_inner)

    def convolve(projects: bool) -> None:
        for index, layer in enumerate(layers):
            gpu._convolve_launch(shape, projects)(
                weight=layer.x_proj, taps=layer.conv_weight, taps_bias=layer.conv_bias, xz=xz,
                conv_state=conv[index], mixed=mixed, part=part, next=layer.out_proj,
            )  # fmt: skip

    products = gpu._products(weights)

    def update(projects: bool) -> None:
        for index, layer in enumerate(layers):
            gpu._update_launch(shape, projects, True)(
                part=part, dt_weight=layer.dt_proj, projected=projected, delta=delta,
                **gpu._scan(layer, ssm[index]), mixed=mixed, xz=xz, y=y, next=products[index + 1],
            )  # fmt: skip

    own_norm = gpu._norm_launch(shape, weights.eps, True)
    stream_of = {"residual": empty(rows, shape.d_model, dtype=torch.float32), "normed": normed.clone()}

    def deltas() -> None:
        for layer in layers:
            gpu._delta_launch(shape)(part=part, dt_weight=layer.dt_proj, projected=projected, delta=delta)

    def norms() -> None:
        for layer in layers:
            own_norm(x=normed, norm=layer.norm, **stream_of)

    add("delta", {}, len(layers) * part.nbytes, deltas, len(layers))
    add("add_norm", {}, len(layers) * 12 * rows * shape.d_model, norms, len(layers))
    for projects in (True, False):
        what = {"projects": projects}
        add("convolve", what, 2 * conv.nbytes, functools.partial(convolve, projects), len(layers))
        add("update", what, 2 * ssm.nbytes, functools.partial(update, projects), len(layers))
    return found


def engine(name: str, rows: int, prompt: int, new: int) -> dict[str, Any]:
    """Return tokens a second of `Engine.generate` with the prompts' reading, median of three runs, and its parts."""
    model = model_of(name)
    made = Engine(model, batch_size=rows, prefill_tokens=65536)
    prompts = torch.randint(2, 50000, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    runs = []
    for _ in range(4):  # the first one compiles and records
        before = (made.stats.prefill_seconds, made.stats.decode_seconds)
        torch.cuda.synchronize()
        began = time.perf_counter()
        made.generate(prompts, params)
        seconds = time.perf_counter() - began
        prefill = made.stats.prefill_seconds - before[0]
        runs.append((seconds, prefill, made.stats.decode_seconds - before[1]))
    seconds, prefill, decode = sorted(runs[1:])[1]
    return {
        "tokens_per_second": rows * new / seconds, "seconds": seconds, "prefill_seconds": prefill,
        "decode_ms_a_token": 1e3 * decode / new, "first_run_seconds": runs[0][0],
    }  # fmt: skip


def host(name: str, rows: int, prompt: int, new: int) -> dict[str, Any]:
    """Return for each way to choose a token the host's microseconds a token, and those it waited for the GPU."""
    model = model_of(name)
    prompts = torch.randint(2, 50000, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    wait, waited = _Block.wait, [0.0]

    def timed_wait(block: _Block) -> list[list[int]]:
        began = time.perf_counter()
        numbers = wait(block)
        waited[0] += time.perf_counter() - began
        return numbers

    results = {}
    try:
        _Block.wait = timed_wait  # type: ignore[method-assign]
        for label, rules in RULES.items():
            made = Engine(model, batch_size=rows, prefill_tokens=65536)
            params = [
                SamplingParams(max_new_tokens=new, ignore_eos=True, seed=row, **rules[row % len(rules)])
                for row in range(rows)
            ]
            runs = []
            for _ in range(8):  # the first one compiles and records
                before, waited[0] = made.stats.decode_seconds, 0.0
                began = time.perf_counter()
                made.generate(prompts, params)
                seconds = time.perf_counter() - began
                decode = made.stats.decode_seconds - before
                runs.append((rows * new / seconds, 1e6 * decode / new, 1e6 * (decode - waited[0]) / new))
            speed, token_us, host_us = (statistics.median(column) for column in zip(*runs[1:], strict=True))
            results[label] = {
                "tokens_per_second": speed, "token_us": token_us, "host_us": host_us, "waits_us": token_us - host_us,
            }  # fmt: skip
            print("  ", label, results[label], flush=True)
            del made
            free()
    finally:
        _Block.wait = wait  # type: ignore[method-assign]
    return results


@torch.no_grad()
def prefill(name: str, rows: int, tokens: int) -> dict[str, Any]:
    """Return milliseconds of reading prompts as it is and from a graph, until all is queued and until it is done."""
    model = model_of(name)
    prompts = torch.randint(2, 50000, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    results: dict[str, Any] = {}
    logits = []
    for label in ("eager", "graph"):
        passes = PromptPasses(model, model, graphs=label == "graph")
        run = functools.partial(passes.run, prompts, None)
        before = torch.cuda.memory_reserved()
        began = time.perf_counter()
        for _ in range(3):  # compiles, and records at the second one
            logits.append(run().logits)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        queued, done = [], []
        for _ in range(11):
            torch.cuda.synchronize()
            began = time.perf_counter()
            read = run()
            queued.append(1e3 * (time.perf_counter() - began))
            torch.cuda.synchronize()
            done.append(1e3 * (time.perf_counter() - began))
            del read
        results[label] = {
            "host_ms": statistics.median(queued), "wall_ms": statistics.median(done), "wall_samples_ms": done,
            "first_three_seconds": seconds, "reserved_bytes": torch.cuda.memory_reserved() - before,
            "counts": dict(passes.counts), "functions": host_functions(run), "kernels": profile(run),
        }  # fmt: skip
        shown = {k: v for k, v in results[label].items() if k not in ("functions", "kernels", "wall_samples_ms")}
        print("  ", label, shown, flush=True)
        del passes, run
        free()
    results["logits_differ"] = ((logits[-1] - logits[0]).norm() / logits[0].norm()).item()
    for row in results["eager"]["functions"]:
        print("  ", row, flush=True)
    return results


def host_functions(run: Callable[[], Any], times: int = 5) -> list[dict[str, Any]]:
    """Return the functions in which the host spends most time, for one call; the profiler makes all slower."""
    profiler = cProfile.Profile()
    for _ in range(times):
        torch.cuda.synchronize()
        profiler.enable()
        run()
        profiler.disable()
    found = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    ordered = sorted(found.items(), key=lambda item: -item[1][2])[:25]
    return [
        {"function": f"{Path(file).name}:{line} {name}", "calls": calls / times, "own_ms": round(1e3 * own / times, 3),
         "all_ms": round(1e3 * every / times, 3)}
        for (file, line, name), (_, calls, own, every, _) in ordered
    ]  # fmt: skip


def free() -> None:
    """Give memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Run every case, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    options = parser.parse_args()
    watch = Stopwatch()
    ceiling = ceilings(DEVICE)
    print(ceiling, flush=True)
    card = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"gpu-decode-step-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{card}.json"
    rows = []
    for case in options.cases:
        kind, name, *numbers = case.split(":")
        sizes = [int(number) for number in numbers]
        gpu.FEW_ROWS, gpu.AHEAD, gpu.AHEAD_ROWS, gpu.FUSED_ROWS = FEW_ROWS, AHEAD, AHEAD_ROWS, FUSED_ROWS
        gpu.product_launch.cache_clear()
        print(case, f"{watch.seconds:.0f} s", flush=True)
        try:
            if kind == "step":
                result: Any = step(name, sizes[0], ceiling["copy_gb_s"])
            else:
                result = {"check": check, "kernels": kernels, "engine": engine, "host": host, "prefill": prefill}[kind](
                    name, *sizes
                )
        except (RuntimeError, UserError, AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
            result = {"error": str(error)[:2000]}
        rows.append({"case": case, "result": result})
        if kind in ("check", "engine") or "error" in result:
            print(result, flush=True)
        free()
        config = {"cases": options.cases}
        write_record(
            path, watch.record("bench", "the one-token step on a GPU", config, {"ceilings": ceiling, "rows": rows})
        )


if __name__ == "__main__":
    main()
