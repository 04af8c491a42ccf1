"""``mambacus finetune``: fine-tune a Mamba model on question-answer data; resumable, audited, one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    method: str = opt("lora", "what is trained: lora, dora, ... lora-x, sdt, state-offset, ... full (docs/finetune.md)")
    resume: bool = opt(False, "continue this run from its last checkpoint")
    lr: float = opt(0.0, "peak learning rate (0: by method and model size)", least=0)
    epochs: float = opt(3.0, "passes over the data", above=0)
    max_steps: int = opt(0, "optimiser steps; above 0 it overrides --epochs", least=0)
    batch_size: int | None = opt(None, "samples in one optimiser step (default: 32; cs5242: 1)", least=1)
    grad_accum: int = opt(1, "parts a step is split into to save memory; the gradient stays the same", least=1)
    max_length: int = opt(1024, "tokens of a sample; longer ones are dropped and counted", least=1)
    pack_length: int = opt(
        -1, "tokens of a packed row; 0: one sample a row; -1: 2048, or --max-length if longer", least=-1
    )
    loss: str | None = opt(
        None,
        "train on the answer alone or on the full text (default: answer; cs5242: full)",
        choices=("answer", "full"),
    )
    rank: int | None = opt(None, "rank of the adapter (default: by method, of lora 16)", least=1)
    alpha: float | None = opt(None, "the adapter is scaled by alpha / rank (default: by method, of lora 32)", above=0)
    dropout: float | None = opt(
        None, "dropout at the adapter's input (default: by method, of lora 0.05)", least=0, below=1
    )
    targets: tuple[str, ...] = opt(
        (), "modules that get an adapter: names, regular expressions, all-linear (default: in_proj,out_proj)"
    )
    options: tuple[str, ...] = opt((), "further keys of the method as KEY=VALUE,...: PEFT's configuration keys")
    checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third slower")
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
    from mambacus.tuning import methods
    from mambacus.tuning.data import encode, read_examples
    from mambacus.tuning.packing import PlannedBatches, plan
    from mambacus.tuning.trainer import Settings, choose_autocast, train

    watch = Stopwatch()
    method = methods.find_method(config.method)
    config = _with_defaults(config, method.preset)
    _check(config)
    options = _options(config.options)
    device = resolve_device(config.device)
    autocast = choose_autocast(config.dtype, device)
    examples = read_examples(config.data, data_dir=config.data_dir, seed=config.seed)
    model, tokenizer = load(config.model, device=device, dtype=torch.float32)
    samples, counts = encode(
        examples, _usable(tokenizer, config.model), max_length=config.max_length, loss=config.loss or "answer"
    )
    _check_vocabulary(samples, model, config.model)
    base_signature = signature(model)
    rate = config.lr or method.learning_rate(methods.count_parameters(model)["total"])
    run_plan = plan(
        [*map(len, samples)], epochs=config.epochs, max_steps=config.max_steps, batch_size=config.batch_size or 1,
        grad_accum=config.grad_accum, seed=config.seed, capacity=_capacity(config) if method.packs else 0,
    )  # fmt: skip
    data = PlannedBatches(samples, run_plan)
    if config.method == "sdt" and "channels" not in options:
        options["channels"] = _sdt_channels(model, data, options, rate)
    torch.manual_seed(config.seed)
    settings = methods.AdapterSettings(config.rank, config.alpha, config.dropout, config.targets, options)
    trained = method.attach(model, settings)
    model.gradient_checkpointing = config.checkpointing
    claim_directory(
        config.out, "finetune", _identity(config, rate, autocast, device, samples, base_signature), resume=config.resume
    )
    if (config.out / RECORD).is_file():
        return read_record(config.out / RECORD)
    parameters: dict[str, Any] = methods.count_parameters(trained)
    parameters["targets"] = _places(trained, config.method)
    _announce(config, parameters, counts, run_plan.steps, rate)
    how = Settings(
        config.out, device, autocast, rate, weight_decay=config.weight_decay, grad_accum=config.grad_accum,
        save_every=config.save_every, seed=config.seed,
    )  # fmt: skip
    results = train(
        trained, data, how, quiet_first=method.quiet_first, rate_of=method.rate_factor, resume=config.resume
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


def _with_defaults(config: Config, preset: Mapping[str, Any]) -> Config:
    """Return ``config`` with the method's values, then the general ones, where nothing was given."""
    values: dict[str, Any] = {"batch_size": 32, "loss": "answer", **preset}
    return dataclasses.replace(config, **{name: v for name, v in values.items() if getattr(config, name) is None})


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` words as a mapping; values are read as YAML.

    Raises:
        UserError: a word that is none.
    """
    import yaml

    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--options: expected KEY=VALUE, got {word!r}")
        try:
            options[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--options: {key}: not a YAML value: {text!r}") from None
    return options


def _capacity(config: Config) -> int:
    return max(2048, config.max_length) if config.pack_length < 0 else config.pack_length


def _sdt_channels(model: Any, data: Any, options: dict[str, Any], rate: float) -> list[list[int]]:
    from mambacus.models.ssm_adapters import checked_options
    from mambacus.tuning.sdt import choose_channels

    return choose_channels(model, data, share=checked_options("sdt", options)["share"], rate=rate)


def _places(trained: Any, method: str) -> list[str]:
    """Return where the method trains, for the record and the screen."""
    if method == "full":
        return ["all"]
    config = getattr(trained, "peft_config", None)
    return sorted(config["default"].target_modules) if config else [method]


def _check(config: Config) -> None:
    """Check the settings that need no model.

    Raises:
        UserError: naming all faults at once.
    """
    faults = []
    if config.grad_accum > (config.batch_size or 1):
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
