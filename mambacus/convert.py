"""``mambacus convert``: write a Mamba model in the Hugging Face or the original format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_empty
from mambacus.runtime.records import Record, Stopwatch, write_record


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert, and into what."""

    model: str = opt(help="tiny, a folder, a hub id or random:SIZE")
    out: Path = opt(help="new or empty folder for the model", metavar="DIR")
    to: str = opt("hf", help="format: hf loads in transformers, original in mamba_ssm", choices=("hf", "original"))
    dtype: str = opt("stored", help="dtype of the weights", choices=("stored", "float32", "bfloat16", "float16"))
    tokenizer: str | None = opt(None, help="tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, help="data folder with tokenizer/20B_tokenizer.json", metavar="DIR")


def run(config: Config) -> Record:
    """Convert, and read the result back: every parameter must be bit for bit what was written.

    ``results``: ``parameters`` (their number), ``bytes`` written, ``files``, ``dtype``. The record is ``record.json``
    in the folder.

    Raises:
        UserError: no such model, a folder that is not empty, a shape the format cannot express, a full disk.
    """
    watch = Stopwatch()
    import torch

    from mambacus.models import load, save
    from mambacus.runtime.device import resolve_dtype

    claim_empty(config.out)
    dtype = None if config.dtype == "stored" else resolve_dtype(config.dtype)
    model, tokenizer = load(config.model, "cpu", dtype, tokenizer=config.tokenizer, data_dir=config.data_dir)
    save(model, config.out, tokenizer, config.to)
    again, _ = load(config.out, "cpu", None, tokenizer=config.tokenizer, data_dir=config.data_dir)
    written = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.dtype != written[name].dtype or not torch.equal(parameter, written[name]):
            raise RuntimeError(f"{config.out}: {name} reads back different from what was written")
    files = sorted(path for path in config.out.iterdir() if path.is_file())
    results = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(path.stat().st_size for path in files),
        "files": [path.name for path in files],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    record = watch.record("convert", config.model, config, results)
    write_record(config.out / "record.json", record)
    return record


def main(argv: Sequence[str]) -> None:
    """Run the verb and print where the model is."""
    config = parse(Config, argv, "mambacus convert", __doc__ or "")
    record = run(config)
    files, size = record.results["files"], record.results["bytes"]
    print(f"{config.out}: {record.results['parameters']:,} parameters in {len(files)} files, {size / 2**20:.1f} MiB")
