"""``mambacus info``: what a model is made of, what it costs, and which kernels would run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record

_OPS = ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update")
_DTYPES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """The model to describe."""

    model: str = opt(help="tiny, a folder, a hub id or random:SIZE", positional=True, metavar="MODEL")
    device: str = opt("auto", help="device to choose kernels for: auto, cpu, cuda or cuda:N")
    out: Path | None = opt(None, help="write the record here", metavar="FILE.json")
    overwrite: bool = opt(False, help="replace an existing record")


def run(config: Config) -> Record:
    """Describe a model from its configuration; no weights are read.

    ``results``: ``parameters`` by part with ``total``; ``weight_bytes`` and ``state_bytes`` (one sequence) by dtype;
    ``flops_per_token`` by part with ``total``; ``backends``, for each op its ``name`` and ``reason``; ``config``.

    Raises:
        UserError: no such model, not a Mamba-1 model, or an existing record.
    """
    watch = Stopwatch()
    from mambacus.models import MambaState, load_config
    from mambacus.models.counting import count_flops, count_parameters
    from mambacus.ops.dispatch import choose_backend
    from mambacus.runtime.device import DTYPES, resolve_device

    if config.out:
        claim_file(config.out, overwrite=config.overwrite)
    device = resolve_device(config.device)
    shape = load_config(config.model)
    choices = {op: choose_backend(op, device, dtype=DTYPES["float32"]) for op in _OPS}
    parameters, in_float32 = count_parameters(shape)
    total = sum(parameters.values())
    results = {
        "config": dataclasses.asdict(shape),
        "parameters": {**parameters, "total": total},
        "weight_bytes": {name: (total - in_float32) * size + in_float32 * 4 for name, size in _DTYPES.items()},
        "state_bytes": {
            name: MambaState.zeros(shape, device="meta", dtype=DTYPES[name]).nbytes for name in _DTYPES
        },
        "flops_per_token": count_flops(shape),
        "device": str(device),
        "backends": {op: dataclasses.asdict(choice) for op, choice in choices.items()},
    }  # fmt: skip
    record = watch.record("info", config.model, config, results)
    if config.out:
        write_record(config.out, record)
    return record


def main(argv: Sequence[str]) -> None:
    """Run the verb and print the description."""
    record = run(parse(Config, argv, "mambacus info", __doc__ or ""))
    print("\n".join(_lines(record.label, record.results)))


def _lines(label: str, results: dict[str, Any]) -> list[str]:
    shape, parameters, flops = results["config"], results["parameters"], results["flops_per_token"]
    head = "tied" if shape["tie_embeddings"] else "own"
    lines = [
        f"{label}: {parameters['total']:,} parameters",
        f"  d_model {shape['d_model']}, {shape['n_layer']} layers, d_state {shape['d_state']}, "
        f"d_conv {shape['d_conv']}, dt_rank {shape['dt_rank']}, vocabulary {shape['vocab_size']}, {head} head",
        f"  {'part':<12}{'parameters':>16}{'FLOP per token':>18}",
    ]
    for part in [*sorted({*parameters, *flops} - {"total"}), "total"]:
        if parameters.get(part, 0) or flops.get(part, 0):
            lines.append(f"  {part:<12}{parameters.get(part, 0):>16,}{flops.get(part, 0):>18,}")
    for dtype in results["weight_bytes"]:
        weights, state = results["weight_bytes"][dtype], results["state_bytes"][dtype]
        lines.append(f"  {dtype}: weights {weights / 2**20:,.1f} MiB, state {state / 2**20:,.3f} MiB a sequence")
    for op, choice in results["backends"].items():
        lines.append(f"  {op} on {results['device']}: {choice['name']} ({choice['reason']})")
    return lines
