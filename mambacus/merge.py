"""``mambacus merge``: fold an adapter into its model; refused unless merged and attached model give the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, write_record

RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus merge``."""

    adapter: Path = opt(help="adapter folder, or the finetune run that made it", metavar="DIR")
    out: Path = opt(help="folder for the merged model", metavar="DIR")
    model: str = opt("", "the base model (default: the one the adapter names)")
    dtype: str = opt(
        "float32",
        "of the written weights; the merge itself is done in float32",
        choices=("float32", "bfloat16", "float16"),
    )
    device: str = opt("cpu", "where to merge and compare: cpu or cuda")
    data_dir: Path | None = opt(None, "folder that may hold the GPT-NeoX tokenizer", metavar="DIR")


def run(config: Config) -> Record:
    """Merge and write a model folder with ``record.json`` in it.

    Raises:
        UserError: no adapter or no model, an adapter for another model, an occupied folder, or logits that differ.
    """
    import torch

    from mambacus.models import load, save
    from mambacus.runtime.device import resolve_device, resolve_dtype
    from mambacus.runtime.outputs import claim_directory, claim_empty, fingerprint
    from mambacus.tuning.adapters import read_adapter
    from mambacus.tuning.merge import compare, gate, merge, prompt_logits
    from mambacus.tuning.peft_methods import silent_about_ties

    watch = Stopwatch()
    adapter = read_adapter(config.adapter)
    base = config.model or adapter.base_model
    if not base:
        raise UserError(f"--adapter {adapter.path}: names no base model; give --model")
    dtype, device = resolve_dtype(config.dtype), resolve_device(config.device)
    claim_empty(config.out)
    with silent_about_ties():
        attached, tokenizer = load(base, device, torch.float32, adapter=adapter.path, data_dir=config.data_dir)
    if tokenizer is None:
        raise UserError(f"--model {base}: has no tokenizer to compare merged and attached model with")
    reference = prompt_logits(attached, tokenizer)
    merged, untied = merge(attached)
    results = {"gate": gate(reference, prompt_logits(merged, tokenizer)), "untied": untied, "base_model": base}
    if dtype != torch.float32:
        merged.to(dtype)
        results["after_cast"] = compare(reference, prompt_logits(merged, tokenizer)) | {"dtype": config.dtype}
    identity = {"adapter": str(adapter.path.resolve()), "model": base, "dtype": config.dtype}
    claim_directory(config.out, "merge", identity | {"content": fingerprint(results)}, resume=True)
    save(merged, config.out, tokenizer)
    record = watch.record("merge", f"{Path(base).name} + {config.adapter.name}", config, results)
    write_record(config.out / RECORD, record)
    return record


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome."""
    config = parse(Config, argv, "mambacus merge", __doc__.splitlines()[0])
    results = run(config).results
    gate, cast = results["gate"], results.get("after_cast")
    print(
        f"merged = attached on {gate['prompts']} prompts: logits differ by at most {gate['max_logit_difference']:.2g} "
        f"(allowed {gate['tolerance']:.2g})" + ("; the head was untied from the embedding" if results["untied"] else "")
    )
    if cast:
        print(f"as {config.dtype} they differ by at most {cast['max_logit_difference']:.2g}")
    print(f"{config.out}")
