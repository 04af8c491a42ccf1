"""Measure one `Case` and print one JSON line: ``python -m mambacus.measuring.worker '{"benchmark": ...}'``.

Without an argument, cases are read from stdin, a line each, and answered as they come (`mambacus.measuring.kept`).
"""

from __future__ import annotations

import gc
import json
import math
import sys
from typing import Any

import torch

from mambacus.measuring.cases import Case
from mambacus.measuring.costs import case_work
from mambacus.measuring.energy import Energy
from mambacus.measuring.kept import ROW
from mambacus.measuring.sides import Side, Step, make_side
from mambacus.measuring.timing import median, time_ms
from mambacus.runtime.device import resolve_device
from mambacus.runtime.memory import PeakMemory

ENERGY_SECONDS = 1.0  # a GPU's counter moves every 20 to 100 ms
_LEFT_BYTES = 2**24  # of GPU memory that a case may leave behind, where others are to follow


def measure(case: Case) -> dict[str, Any]:
    """Build the side of ``case`` with random weights, time its step and return the figures.

    Returns:
        ``samples_ms``, ``median_ms``, ``tokens_per_second``, ``peak_memory_bytes``, ``peak_memory_of`` (see
        `PeakMemory`), ``weights_memory_bytes`` (the same before the first step), ``weights_bytes``, ``state_bytes`` (or
        null), ``work`` (see `case_work`), ``flops``, ``energy_joules`` of one run (or null); of ``generate`` also
        ``time_to_first_token_ms``; of ``samples`` also ``prompt_tokens`` (read in one run), and for ours
        ``decode_alone_ms`` and ``ratio_to_decode``.
    """
    if case.threads:
        torch.set_num_threads(case.threads)
    device = resolve_device(case.device)
    torch.manual_seed(0)
    side = make_side(case)
    memory = PeakMemory(device)
    memory.restart()  # before the step is made: a graph takes its memory when it is captured
    before = memory.read()
    step = _step(case, side)
    time_ms(step, device, repeats=0, warmup=case.warmup)
    with Energy(device) as energy:
        samples = time_ms(step, device, repeats=case.repeats, warmup=0)
    joules = None if energy.joules is None else energy.joules / case.repeats
    if joules is not None and device.type == "cuda":
        joules = _joules(step, device, median(samples))
    work = case_work(case, side.read_bytes)
    row = {
        "samples_ms": [round(sample, 3) for sample in samples],
        "median_ms": round(median(samples), 3),
        "tokens_per_second": round(1e3 * case.tokens / median(samples), 2),
        "peak_memory_bytes": memory.read(),
        "peak_memory_of": memory.of,
        "weights_memory_bytes": before,
        "weights_bytes": side.weights_bytes,
        "state_bytes": side.state_bytes(),
        "work": work,
        "flops": sum(flops for flops, _ in work),
        "energy_joules": None if joules is None else round(joules, 3),
    }
    return row | side.facts() | _more(case, side, step, device)


def _joules(step: Step, device: torch.device, milliseconds: float) -> float | None:
    """Return the energy of one run on a GPU, over so many that its slow counter can tell."""
    runs = math.ceil(1e3 * ENERGY_SECONDS / milliseconds)
    with Energy(device) as energy:
        time_ms(step, device, repeats=runs, warmup=0)
    return None if energy.joules is None else energy.joules / runs


def _step(case: Case, side: Side) -> Step:
    if case.benchmark in ("generate", "samples"):
        return side.generate(case.new_tokens)
    step: Step = getattr(side, case.benchmark)()
    return step


def _more(case: Case, side: Side, step: Step, device: torch.device) -> dict[str, Any]:
    """Return what only generation from end to end has to say."""
    if case.benchmark == "generate":
        first = time_ms(side.generate(1), device, repeats=case.repeats, warmup=min(case.warmup, 1))
        return {"time_to_first_token_ms": round(median(first), 3)}
    if case.benchmark == "samples":
        return _samples(case, side, step, device)
    return {}


def _samples(case: Case, side: Any, step: Step, device: torch.device) -> dict[str, Any]:
    """Time samples of one prompt and decoding alone in turn, and count the prompt tokens that one run reads."""
    if not hasattr(side, "decode_alone"):
        return {"prompt_tokens": case.samples * case.seqlen}  # every row reads the prompt
    alone = side.decode_alone()
    pairs = []
    for _ in range(max(case.repeats, 3)):
        before = side.prompt_tokens
        (whole,) = time_ms(step, device, repeats=1, warmup=0)
        read = side.prompt_tokens - before
        pairs.append((whole, *time_ms(alone, device, repeats=1, warmup=0)))
    ratio = median([whole / decoding for whole, decoding in pairs])
    return {
        "prompt_tokens": read,
        "decode_alone_ms": round(median([decoding for _, decoding in pairs]), 3),
        "ratio_to_decode": round(ratio, 4),
    }


def _gives_memory_back() -> bool:
    """Free what a case has left on the GPU; return whether that was (nearly) all."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return True
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() <= _LEFT_BYTES


def main(arguments: list[str]) -> None:
    """Measure the case given as an argument, or those that come from stdin."""
    if arguments:
        print(json.dumps(measure(Case(**json.loads(arguments[0])))))
        return
    for line in sys.stdin:
        row = measure(Case(**json.loads(line)))
        print(ROW + json.dumps(row | {"gave_memory_back": _gives_memory_back()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
