"""``mambacus info``: what a model is made of, what it costs, and which kernels would run it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record

if TYPE_CHECKING:
    import torch

    from mambacus.models.costs import Costs

_DTYPES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """The model to describe."""

    model: str = opt(help="tiny, a folder, a hub id or random:SIZE", positional=True, metavar="MODEL")
    device: str = opt("auto", help="device to choose kernels for: auto, cpu, cuda or cuda:N")
    out: Path | None = opt(None, help="write the record here", metavar="FILE.json")
    json: bool = opt(False, help="print the description as JSON")
    overwrite: bool = opt(False, help="replace an existing record")


def run(config: Config) -> Record:
    """Describe a model from its configuration; no weights are read.

    ``results``: ``parameters`` by part with ``total``; ``weight_bytes`` and ``state_bytes`` (one sequence) by dtype;
    ``flops_per_token`` by part with ``total``; ``backends``, for each op its ``name`` and ``reason``; ``kernels``, what
    they are on this device; ``config``. Of a Transformer (GPT-NeoX, OPT, GPT-Neo, GPT-2): ``cache_bytes`` (keys
    and values of one token) by dtype and ``context_flops`` (for each position that a token attends to) in place of
    ``state_bytes``, and no ``backends``.

    Raises:
        UserError: no such model, an architecture that is neither, or an existing record.
    """
    from mambacus.models.costs import costs_of
    from mambacus.runtime.device import resolve_device

    watch = Stopwatch()
    if config.out:
        claim_file(config.out, overwrite=config.overwrite)
    device = resolve_device(config.device)
    costs = costs_of(config.model)
    transformer = costs is not None and costs.family != "mamba"
    results = _transformer(costs, device) if costs and transformer else _mamba(config.model, device)
    record = watch.record("info", config.model, config, results)
    if config.out:
        write_record(config.out, record)
    return record


def _mamba(name: str, device: torch.device) -> dict[str, Any]:
    from mambacus.models import MambaState, load_config
    from mambacus.models.counting import count_flops, count_parameters
    from mambacus.ops.dispatch import which_kernels
    from mambacus.runtime.device import DTYPES

    shape = load_config(name)
    parameters, in_float32 = count_parameters(shape)
    total = sum(parameters.values())
    return {
        "config": dataclasses.asdict(shape),
        "parameters": {**parameters, "total": total},
        "weight_bytes": {name: (total - in_float32) * size + in_float32 * 4 for name, size in _DTYPES.items()},
        "state_bytes": {
            name: MambaState.zeros(shape, device="meta", dtype=DTYPES[name]).nbytes for name in _DTYPES
        },
        "flops_per_token": count_flops(shape),
        "device": str(device),
        **which_kernels(device),
    }  # fmt: skip


def _transformer(costs: Costs, device: torch.device) -> dict[str, Any]:
    shape = {
        "model_type": costs.family,
        "d_model": costs.width,
        "n_layer": costs.n_layer,
        "vocab_size": costs.vocab_size,
    }
    return {
        "config": shape | {"tie_embeddings": costs.parameters["lm_head"] == 0},
        "parameters": {**costs.parameters, "total": costs.total_parameters},
        "weight_bytes": {name: costs.total_parameters * size for name, size in _DTYPES.items()},
        "cache_bytes": {name: costs.state_bytes(size, 1) for name, size in _DTYPES.items()},
        "flops_per_token": {**costs.flops, "total": costs.total_flops},
        "context_flops": costs.context_flops,
        "device": str(device),
        "backends": {},
        "kernels": "those of transformers: it is a baseline, our kernels run Mamba alone",
    }


def main(argv: Sequence[str]) -> None:
    """Run the verb and print the description."""
    config = parse(Config, argv, "mambacus info", __doc__ or "")
    record = run(config)
    if config.json:
        print(json.dumps({"model": record.label, **record.results}, indent=1))
    else:
        print("\n".join(_lines(record.label, record.results)))


def _lines(label: str, results: dict[str, Any]) -> list[str]:
    shape, parameters, flops = results["config"], results["parameters"], results["flops_per_token"]
    head = "tied" if shape["tie_embeddings"] else "own"
    lines = [
        f"{label}: {parameters['total']:,} parameters",
        f"  {_shape(shape)}, vocabulary {shape['vocab_size']}, {head} head",
        f"  {'part':<12}{'parameters':>16}{'FLOP per token':>18}",
    ]
    for part in [*sorted({*parameters, *flops} - {"total"}), "total"]:
        if parameters.get(part, 0) or flops.get(part, 0):
            lines.append(f"  {part:<12}{parameters.get(part, 0):>16,}{flops.get(part, 0):>18,}")
    for dtype in results["weight_bytes"]:
        weights = f"  {dtype}: weights {results['weight_bytes'][dtype] / 2**20:,.1f} MiB"
        if "state_bytes" in results:
            lines.append(f"{weights}, state {results['state_bytes'][dtype] / 2**20:,.3f} MiB a sequence")
        else:
            lines.append(f"{weights}, keys and values {results['cache_bytes'][dtype] / 2**10:,.1f} KiB a token")
    if "context_flops" in results:
        lines.append(f"  attention: {results['context_flops']:,} FLOP more for each position a token looks back at")
    for op, choice in results["backends"].items():
        lines.append(f"  {op} on {results['device']}: {choice['name']} ({choice['reason']})")
    return [*lines, f"  kernels on {results['device']}: {results['kernels']}"]


def _shape(shape: dict[str, Any]) -> str:
    known = f"d_model {shape['d_model']}, {shape['n_layer']} layers"
    if "model_type" in shape:
        return f"{shape['model_type']}, {known}"
    return f"{known}, d_state {shape['d_state']}, d_conv {shape['d_conv']}, dt_rank {shape['dt_rank']}"
