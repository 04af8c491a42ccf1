"""Measure one `Case` and print one JSON line: ``python -m mambacus.measuring.worker '{"benchmark": ...}'``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from mambacus.measuring.cases import Case
from mambacus.measuring.costs import case_work
from mambacus.measuring.energy import Energy
from mambacus.measuring.sides import Side, Step, make_side
from mambacus.measuring.timing import median, time_ms
from mambacus.runtime.device import resolve_device
from mambacus.runtime.memory import PeakMemory


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
        "energy_joules": None if energy.joules is None else round(energy.joules / case.repeats, 3),
    }
    return row | side.facts() | _more(case, side, step, device)


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


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
