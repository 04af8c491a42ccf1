"""``mambacus finetune``: fine-tune a Mamba model on question-answer data; resumable, audited, one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_record

if TYPE_CHECKING:
    from torch import nn

    from mambacus.models.signature import Signature

RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus finetune``."""

    model: str = opt(help="tiny, a model folder, a hub id, or random:SIZE")
    data: str = opt(
        help="JSONL file of question, answer[, solution]; wordproblems:N; a set under --data-dir (gsm8k); a hub id"
    )
    out: Path = opt(help="folder for adapter or model, record, checkpoints and log", metavar="DIR")
    method: str = opt("lora", "lora or full")
    resume: bool = opt(False, "continue this run from its last checkpoint")
    lr: float = opt(0.0, "peak learning rate (0: by method and model size)", least=0)
    epochs: float = opt(3.0, "passes over the data", above=0)
    max_steps: int = opt(0, "optimiser steps; above 0 it overrides --epochs", least=0)
    batch_size: int = opt(32, "samples in one optimiser step", least=1)
    grad_accum: int = opt(1, "parts a step is split into to save memory; the gradient stays the same", least=1)
    max_length: int = opt(1024, "tokens of a sample; longer ones are dropped and counted", least=1)
    pack_length: int = opt(
        -1, "tokens of a packed row; 0: one sample a row; -1: 2048, or --max-length if longer", least=-1
    )
    loss: str = opt("answer", "train on the answer alone or on the full text", choices=("answer", "full"))
    rank: int = opt(16, "rank of the adapter", least=1)
    alpha: float = opt(32.0, "the adapter is scaled by alpha / rank", above=0)
    dropout: float = opt(0.05, "dropout probability at the adapter's input", least=0, below=1)
    targets: tuple[str, ...] = opt(("in_proj", "out_proj"), "modules that get an adapter")
    weight_decay: float = opt(0.01, "AdamW's, on matrices only; never on A_log, D, norms, biases", least=0)
    seed: int = opt(0, "seed of order, dropout, adapter and generated data", least=0, most=MOST_SEED)
    device: str = opt("auto", "auto, cpu or cuda")
    dtype: str = opt("auto", "of the matrix products: auto, float32 or bfloat16; weights are float32")
    save_every: int = opt(100, "steps between checkpoints", least=1)
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")


def run(config: Config) -> Record:
    """Fine-tune; leave ``adapter/`` or ``model/``, ``record.json``, ``checkpoints/`` and ``tensorboard/`` in ``--out``.

    Raises:
        UserError: a wrong setting, unreadable data or model, a folder that holds another run, or the audit stopped it.
    """
    import torch

    from mambacus.models import load
    from mambacus.models.signature import signature
    from mambacus.runtime.device import resolve_device
    from mambacus.runtime.outputs import claim_directory
    from mambacus.tuning import adapters
    from mambacus.tuning.data import encode, read_examples
    from mambacus.tuning.packing import PlannedBatches, plan
    from mambacus.tuning.trainer import Settings, choose_autocast, train

    watch = Stopwatch()
    _check(config)
    method = adapters.find_method(config.method)
    device = resolve_device(config.device)
    autocast = choose_autocast(config.dtype, device)
    examples = read_examples(config.data, data_dir=config.data_dir, seed=config.seed)
    model, tokenizer = load(config.model, device=device, dtype=torch.float32)
    samples, counts = encode(examples, _usable(tokenizer, config.model), max_length=config.max_length, loss=config.loss)
    _check_vocabulary(samples, model, config.model)
    base_signature = signature(model)
    rate = config.lr or method.learning_rate(adapters.count_parameters(model)["total"])
    torch.manual_seed(config.seed)
    places = adapters.AdapterSettings(config.rank, config.alpha, config.dropout, config.targets)
    trained = method.attach(model, places)
    claim_directory(
        config.out, "finetune", _identity(config, rate, autocast, device, samples, base_signature), resume=config.resume
    )
    if (config.out / RECORD).is_file():
        return read_record(config.out / RECORD)

    run_plan = plan(
        [*map(len, samples)], epochs=config.epochs, max_steps=config.max_steps, batch_size=config.batch_size,
        grad_accum=config.grad_accum, seed=config.seed,
        capacity=max(2048, config.max_length) if config.pack_length < 0 else config.pack_length,
    )  # fmt: skip
    parameters: dict[str, Any] = adapters.count_parameters(trained)
    parameters["targets"] = list(config.targets) if method.saves == "adapter" else ["all"]
    _announce(config, parameters, counts, run_plan.steps, rate)
    settings = Settings(
        config.out, device, autocast, rate, weight_decay=config.weight_decay, grad_accum=config.grad_accum,
        save_every=config.save_every, seed=config.seed,
    )  # fmt: skip
    results = train(
        trained, PlannedBatches(samples, run_plan), settings, quiet_first=method.quiet_first, resume=config.resume
    )
    _save(config, method.saves, trained, tokenizer, base_signature)
    results |= {
        "parameters": parameters,
        "data": counts | {"packing_efficiency": round(run_plan.efficiency, 4)},
        "learning_rate": rate,
        "autocast": str(autocast).removeprefix("torch."),
    }
    record = watch.record("finetune", f"{Path(config.model).name} + {config.method}", config, results)
    write_record(config.out / RECORD, record)
    return record


def _check(config: Config) -> None:
    """Check the settings that need no model.

    Raises:
        UserError: naming all faults at once.
    """
    faults = []
    if config.grad_accum > max(1, config.batch_size):
        faults.append(f"--grad-accum {config.grad_accum}: more parts than --batch-size {config.batch_size} samples")
    if 0 < config.pack_length < config.max_length:
        faults.append(f"--pack-length {config.pack_length}: shorter than --max-length {config.max_length}")
    check(config, *faults)


def _usable(tokenizer: Any, model: str) -> Any:
    if tokenizer is None:
        raise UserError(f"--model {model}: has no tokenizer; put tokenizer.json into the model's folder")
    return tokenizer


def _check_vocabulary(samples: Sequence[Any], model: Any, name: str) -> None:
    highest = max(int(sample.ids.max()) for sample in samples)
    if highest >= model.config.vocab_size:
        raise UserError(
            f"--model {name}: its tokenizer gives token {highest}, its embedding has {model.config.vocab_size} rows; "
            "they do not belong together"
        )


def _identity(
    config: Config, rate: float, autocast: Any, device: Any, samples: Sequence[Any], base_signature: Signature
) -> dict[str, Any]:
    """Return what decides the result of a run, and nothing else; a run may be resumed when it is equal."""
    import hashlib

    from mambacus.runtime.outputs import fingerprint

    content = hashlib.sha256()
    for sample in samples:
        content.update(sample.ids.tobytes())
    identity = dataclasses.asdict(config)
    for key in ("out", "resume", "save_every", "data_dir", "device", "dtype"):
        del identity[key]
    return identity | {
        "lr": rate,
        "autocast": str(autocast),
        "device": device.type,
        "data": f"{config.data} {content.hexdigest()[:16]}",
        "model": f"{config.model} {fingerprint(base_signature)}",
    }


def _announce(config: Config, parameters: dict[str, Any], counts: dict[str, Any], steps: int, rate: float) -> None:
    share = 100 * parameters["trainable"] / parameters["total"]
    print(
        f"{config.method}: {parameters['trainable']:,} of {parameters['total']:,} parameters train ({share:.2f} %): "
        f"{', '.join(parameters['targets'])}; peak rate {rate:g}"
    )
    dropped = "".join(f", {number} dropped ({reason})" for reason, number in counts["dropped"].items())
    print(
        f"data: {counts['kept']} of {counts['rows']} rows{dropped}, {counts['duplicates']} repeated, "
        f"{counts['tokens']:,} tokens; {steps} steps of {config.batch_size}"
    )


def _save(config: Config, kind: str, trained: nn.Module, tokenizer: Any, base_signature: Signature) -> None:
    """Write the result; one of an earlier attempt that died before its record is replaced."""
    import shutil

    from mambacus.models import save
    from mambacus.tuning.adapters import save_adapter

    if kind == "model":
        shutil.rmtree(config.out / "model", ignore_errors=True)
        save(trained, config.out / "model", tokenizer)
        return
    shutil.rmtree(config.out / "adapter", ignore_errors=True)
    folder = Path(config.model).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else config.model
    save_adapter(trained, config.out / "adapter", base_model=base, base_signature=base_signature)


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome."""
    config = parse(Config, argv, "mambacus finetune", __doc__.splitlines()[0])
    results = run(config).results
    train = results["train"]
    print(
        f"{train['steps']} steps, loss {train['loss_first']:.3f} -> {train['loss_last']:.3f}, "
        f"{train['tokens_per_second']:,.0f} tokens/s, {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    print(f"{config.out / ('model' if config.method == 'full' else 'adapter')}  record: {config.out / RECORD}")
