"""``mambacus merge``: fold adapters into their model; refused unless merged and attached model give the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, write_record

if TYPE_CHECKING:
    import torch

    from mambacus.models import MambaLM
    from mambacus.tuning.adapters import AdapterFolder

RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus merge``."""

    adapter: tuple[Path, ...] = opt(help="adapter folder, or the finetune run that made it; several are combined")
    out: Path = opt(help="folder for the merged model", metavar="DIR")
    model: str = opt("", "the base model (default: the one the adapter names)")
    dtype: str = opt(
        "float32",
        "of the written weights; the merge itself is done in float32",
        choices=("float32", "bfloat16", "float16"),
    )
    weights: tuple[float, ...] = opt((), "factor of each adapter (default: equal shares)")
    combine: str = opt("linear", "how several adapters become one", choices=("linear", "ties", "dare", "dare-ties"))
    density: float = opt(0.5, "share of the changes that ties and dare keep", above=0, most=1)
    seed: int = opt(0, "of what dare drops", least=0, most=MOST_SEED)
    device: str = opt("cpu", "where to merge and compare: cpu or cuda")
    data_dir: Path | None = opt(None, "folder that may hold the GPT-NeoX tokenizer", metavar="DIR")


def run(config: Config) -> Record:
    """Merge and write a model folder with ``record.json`` in it.

    Raises:
        UserError: no adapter or no model, an adapter for another model, an occupied folder, or logits that differ.
    """
    import torch

    from mambacus.models import save
    from mambacus.runtime.device import resolve_device, resolve_dtype
    from mambacus.runtime.outputs import claim_directory, claim_empty, fingerprint
    from mambacus.tuning.adapters import read_adapter
    from mambacus.tuning.combine import check_rule
    from mambacus.tuning.merge import compare, prompt_logits

    watch = Stopwatch()
    adapters = [read_adapter(path) for path in config.adapter]
    weights = check_rule(config.combine, config.weights, len(adapters))
    base = _base(config, adapters)
    dtype, device = resolve_dtype(config.dtype), resolve_device(config.device)
    claim_empty(config.out)
    if len(adapters) == 1 and weights == (1.0,):
        merged, tokenizer, results = _merge_one(config, base, device, adapters[0])
    else:
        merged, tokenizer, results = _merge_several(config, base, device, adapters, weights)
    results["base_model"] = base
    if dtype != torch.float32:
        reference = prompt_logits(merged, tokenizer)
        merged.to(dtype)
        results["after_cast"] = compare(reference, prompt_logits(merged, tokenizer)) | {"dtype": config.dtype}
    identity = {"adapter": [str(a.path.resolve()) for a in adapters], "model": base, "dtype": config.dtype}
    claim_directory(config.out, "merge", identity | {"content": fingerprint(results)}, resume=True)
    save(merged, config.out, tokenizer)
    names = " + ".join(path.name for path in config.adapter)
    record = watch.record("merge", f"{Path(base).name} + {names}", config, results)
    write_record(config.out / RECORD, record)
    return record


def _base(config: Config, adapters: Sequence[AdapterFolder]) -> str:
    """Return the name of the model that all adapters were made for.

    Raises:
        UserError: they name none, or several.
    """
    if config.model:
        return config.model
    named = sorted({adapter.base_model for adapter in adapters})
    if not all(named):
        raise UserError(f"--adapter {adapters[0].path}: names no base model; give --model")
    if len(named) > 1:
        raise UserError(f"--adapter: made for different models: {', '.join(named)}; give --model if they are one")
    return named[0]


def _merge_one(
    config: Config, base: str, device: torch.device, adapter: AdapterFolder
) -> tuple[MambaLM, Any, dict[str, Any]]:
    """Return the merged model, its tokenizer and the results; refuse what computes something else than the attached."""
    import torch

    from mambacus.models import load
    from mambacus.tuning.merge import gate, merge, prompt_logits
    from mambacus.tuning.peft_methods import silent_about_ties

    with silent_about_ties():
        attached, tokenizer = load(base, device, torch.float32, adapter=adapter.path, data_dir=config.data_dir)
    if tokenizer is None:
        raise UserError(f"--model {base}: has no tokenizer to compare merged and attached model with")
    reference = prompt_logits(attached, tokenizer)
    merged, untied = merge(attached)
    return merged, tokenizer, {"gate": gate(reference, prompt_logits(merged, tokenizer)), "untied": untied}


def _merge_several(
    config: Config, base: str, device: torch.device, adapters: Sequence[AdapterFolder], weights: tuple[float, ...]
) -> tuple[MambaLM, Any, dict[str, Any]]:
    """Merge each adapter for itself, then combine the changes; the gate of the record is the worst of theirs."""
    import torch

    from mambacus.models import load
    from mambacus.tuning.combine import Combination, combine, parameters_of
    from mambacus.tuning.merge import compare, prompt_logits

    tuned, logits, gates, untied = [], [], [], False
    for adapter in adapters:
        merged, tokenizer, results = _merge_one(config, base, device, adapter)
        tuned.append(parameters_of(merged))
        logits.append(prompt_logits(merged, tokenizer))
        gates.append(results["gate"] | {"adapter": str(adapter.path)})
        untied |= results["untied"]
    model, tokenizer = load(base, device, torch.float32, data_dir=config.data_dir)
    how = Combination(config.combine, weights, config.density, config.seed)
    combined = combine(model, tuned, how, untied=untied)
    ours = prompt_logits(combined, tokenizer)
    worst = max(gates, key=lambda found: found["max_logit_difference"] / found["tolerance"])
    return combined, tokenizer, {
        "gate": worst,
        "gates": gates,
        "untied": untied,
        "combination": dataclasses.asdict(how),
        "from_each": [compare(alone, ours)["max_logit_difference"] for alone in logits],
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome."""
    config = parse(Config, argv, "mambacus merge", __doc__.splitlines()[0])
    results = run(config).results
    gate, cast = results["gate"], results.get("after_cast")
    print(
        f"merged = attached on {gate['prompts']} prompts: logits differ by at most {gate['max_logit_difference']:.2g} "
        f"(allowed {gate['tolerance']:.2g})" + ("; the head was untied from the embedding" if results["untied"] else "")
    )
    if "combination" in results:
        shares = " + ".join(
            f"{w:g} {path.name}" for w, path in zip(results["combination"]["weights"], config.adapter, strict=True)
        )
        print(f"{config.combine}: {shares}")
    if cast:
        print(f"as {config.dtype} they differ by at most {cast['max_logit_difference']:.2g}")
    print(f"{config.out}")
