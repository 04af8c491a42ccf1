"""``mambacus finetune``: fine-tune a Mamba model, audited, resumable, with its gain and its cost in one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_jsonl_atomic, write_record

if TYPE_CHECKING:
    import torch

    from mambacus.models.signature import Signature
    from mambacus.tuning.methods import Method
    from mambacus.tuning.packing import Plan, PlannedBatches
    from mambacus.tuning.prepare import DataSettings, Prepared

RECORD = "record.json"
LEFT_OUT = "left_out.jsonl"
LEAST_REAL = 0.97  # share of computed tokens that are real, below which a run says so
_WHERE_AND_HOW = ("out", "resume", "save_every", "data_dir", "device", "dtype", "cache", "check", "held_out", "sweep",
                  "collect", "cuda_graph", "spike_stop")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus finetune``."""

    model: str = opt(help="tiny, a model folder, a hub id, or random:SIZE")
    data: str = opt(
        help="JSONL, CSV or Parquet file; wordproblems:N; a set under --data-dir (gsm8k); a hub id (docs/finetune.md)"
    )
    out: Path = opt(help="folder for adapter or model, record, checkpoints and log", metavar="DIR")
    method: str = opt("lora", "what is trained: lora, dora, ... lora-x, sdt, state-offset, ... full (docs/finetune.md)")
    resume: bool = opt(False, "continue this run from its last checkpoint")
    lr: float = opt(0.0, "peak learning rate (0: by method and model size)", least=0)
    epochs: float = opt(3.0, "passes over the data", above=0)
    max_steps: int = opt(0, "optimiser steps; above 0 it overrides --epochs", least=0)
    batch_size: int | None = opt(None, "samples in one optimiser step (default: 32; cs5242: 1)", least=1)
    grad_accum: int = opt(1, "parts a step is split into to save memory; the gradient stays the same", least=1)
    max_length: int = opt(1024, "tokens of a sample; longer ones are dropped and counted, text is cut", least=1)
    pack_length: int = opt(
        -1, "tokens of a packed row; 0: one sample a row; -1: 2048 or more, by the data (docs/finetune.md)", least=-1
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
    convert: str = opt("auto", "how rows become questions: auto, none, gsm8k, orca-math, metamath, aqua or mathqa")
    drop_duplicates: bool = opt(False, "leave exact repetitions out instead of counting them")
    decontaminate_against: tuple[str, ...] = opt(
        (), "leave out rows that share 13 words in a row with these evaluation sets: gsm8k,svamp,..."
    )
    cache: Path | None = opt(None, "folder of token files: for sets larger than memory, found again", metavar="DIR")
    check: int = opt(50, "problems, passages and questions asked before and after; 0: none", least=0)
    held_out: str = opt("", "math set whose test problems are asked (default: that of --data)")
    sweep: tuple[str, ...] = opt((), "train over a grid: method=lora|dora,lr=1e-3|5e-4,seed=0|1; one comparison record")
    collect: bool = opt(False, "with --sweep: write the comparison record of finished runs in --out, train nothing")
    device: str = opt("auto", "auto, cpu or cuda")
    dtype: str = opt("auto", "of the matrix products: auto, float32 or bfloat16; weights are float32")
    cuda_graph: str = opt(
        "auto",
        "record passes as CUDA graphs and repeat them: less work for the CPU (auto: one GPU, full or LoRA)",
        choices=("auto", "on", "off"),
    )
    spike_stop: bool = opt(True, "stop where the loss leaps and stays up (docs/finetune.md)")
    save_every: int = opt(100, "steps between checkpoints", least=1)
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")


def run(config: Config) -> Record:
    """Fine-tune; leave ``adapter/`` or ``model/``, ``record.json``, ``checkpoints/`` and ``tensorboard/`` in ``--out``.

    Raises:
        UserError: a wrong setting, unreadable data or model, a folder that holds another run, or the audit stopped it.
    """
    if config.collect and not config.sweep:
        raise UserError("--collect: needs the grid of the runs to collect: --sweep")
    if config.sweep:
        from mambacus.finetune_sweep import sweep

        return sweep(config, run, check_early)
    watch = Stopwatch()
    import torch

    from mambacus.models import load
    from mambacus.models.signature import signature
    from mambacus.ops.dispatch import which_kernels
    from mambacus.runtime.device import resolve_device
    from mambacus.tuning import methods, processes, sharding
    from mambacus.tuning.prepare import prepare
    from mambacus.tuning.trainer import choose_autocast, train

    given = config
    method, config, options = _settled(config)
    processes.join(config.device)
    device = resolve_device(config.device)
    autocast = choose_autocast(config.dtype, device)
    model, tokenizer = load(config.model, device=device, dtype=torch.float32)
    prepared = prepare(_data_settings(config), _usable(tokenizer, config.model))
    _check_vocabulary(prepared.highest, model, config.model)
    base_signature = signature(model)
    rate = config.lr or method.learning_rate(methods.count_parameters(model)["total"])
    data = _batches(config, method, prepared)
    if config.method == "sdt" and "channels" not in options:
        options["channels"] = _sdt_channels(model, data, options, rate)
    torch.manual_seed(config.seed)
    settings = methods.AdapterSettings(config.rank, config.alpha, config.dropout, config.targets, options)
    trained = method.attach(model, settings)
    model.gradient_checkpointing = config.checkpointing
    finished = _claim(config, _identity(config, rate, autocast, device, prepared.content, base_signature))
    if finished:
        return finished
    parameters = methods.count_parameters(trained) | {"targets": _places(trained, config.method)}
    if processes.is_main():
        _announce(config, parameters, prepared.counts, data.plan, rate)
        write_jsonl_atomic(config.out / LEFT_OUT, prepared.listed)
    checking = _Check(config, device, tokenizer)
    results = train(
        trained, data, _how(config, device, autocast, rate),
        quiet_first=method.quiet_first, rate_of=method.rate_factor, resume=config.resume,
    )  # fmt: skip
    shared = sharding.gathered_result(trained) if processes.is_sharded() else None
    if processes.is_main():
        _save(config, method.saves, trained, tokenizer, base_signature, shared)
    results |= {
        "parameters": parameters,
        "settings": {name: getattr(config, name) for name in ("batch_size", "loss", "rank", "alpha", "dropout")},
        "data": prepared.counts | {"packing_efficiency": round(data.plan.efficiency, 4)},
        "learning_rate": rate,
        "autocast": str(autocast).removeprefix("torch."),
        "processes": processes.world_size(),
        "sharded": processes.is_sharded(),
        "ran_on": which_kernels(device),
        "check": checking.after(trained, shared is not None),
    }
    # as it was asked for, so that a study finds it again; what the method filled in stands among the results
    record = watch.record("finetune", f"{Path(config.model).name} + {config.method}", given, results)
    if processes.is_main():
        write_record(config.out / RECORD, record)
    processes.wait()
    return record


class _Check:
    """Asks the base before training and the tuned model after it; does nothing with ``--check 0``."""

    def __init__(self, config: Config, device: torch.device, tokenizer: Any) -> None:
        from mambacus import finetune_check
        from mambacus.tuning import processes

        self.config, self.device, self.tokenizer = config, device, tokenizer
        self.before: dict[str, Any] = {}
        self.active = bool(config.check) and processes.is_main()
        if self.active:
            self.questions = finetune_check.choose_questions(
                config.data, config.held_out, config.check, config.data_dir, config.max_length
            )
            self.before = finetune_check.answers_of_base(config.out, config.model, device, self.questions)
        processes.wait()

    def after(self, trained: Any, shared: bool) -> dict[str, Any]:
        """Return the comparison; a model that is ``shared`` out cannot answer here alone, so what was saved does."""
        from mambacus import finetune_check

        if not self.active:
            return {}
        answers = finetune_check.ask(self._saved() if shared else trained, self.tokenizer, self.questions)
        return finetune_check.compare(self.before, answers)

    def _saved(self) -> Any:
        import torch

        from mambacus.models import load

        whole = self.config.method == "full"
        name, adapter = (self.config.out / "model", None) if whole else (self.config.model, self.config.out / "adapter")
        return load(name, device=self.device, dtype=torch.float32, adapter=adapter)[0]


def _with_defaults(config: Config, preset: Mapping[str, Any]) -> Config:
    """Return ``config`` with the method's values, then the general ones, where nothing was given."""
    values: dict[str, Any] = {"batch_size": 32, "loss": "answer", **preset}
    return dataclasses.replace(config, **{name: v for name, v in values.items() if getattr(config, name) is None})


def _settled(config: Config) -> tuple[Method, Config, dict[str, Any]]:
    """Return the method, the settings with its defaults filled in, and its options.

    Raises:
        UserError: an unknown method, or settings that need no model are wrong.
    """
    from mambacus.tuning.methods import find_method

    method = find_method(config.method)
    config = _with_defaults(config, method.preset)
    _check(config)
    return method, config, _options(config.options)


def check_early(configs: Iterable[Config]) -> Iterator[tuple[Config, str]]:
    """Yield the faults that need no model, each with its run: of the settings, the options, the first row of the data.

    Data that several runs read alike are looked at once.
    """
    from mambacus.runtime.device import resolve_device
    from mambacus.tuning.methods import AdapterSettings
    from mambacus.tuning.prepare import check_source
    from mambacus.tuning.trainer import choose_autocast

    def settings(config: Config) -> None:
        method, one, options = _settled(config)
        method.check(AdapterSettings(one.rank, one.alpha, one.dropout, one.targets, options))

    def device(config: Config) -> None:
        choose_autocast(config.dtype, resolve_device(config.device))

    def data(config: Config) -> None:
        wanted = _data_settings(config)
        if wanted not in looked_at:
            looked_at.add(wanted)
            check_source(wanted)

    looked_at: set[DataSettings] = set()
    for config in configs:
        for look in (settings, device, data):
            try:
                look(config)
            except UserError as error:
                yield config, str(error)


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


def _data_settings(config: Config) -> DataSettings:
    from mambacus.tuning.prepare import DataSettings

    return DataSettings(
        config.data, config.data_dir, config.seed, config.convert, config.max_length, config.loss or "answer",
        config.drop_duplicates, config.decontaminate_against, config.cache,
    )  # fmt: skip


def _batches(config: Config, method: Method, prepared: Prepared) -> PlannedBatches:
    from mambacus.tuning.packing import PlannedBatches, plan
    from mambacus.tuning.processes import world_size

    def laid_out(capacity: int) -> Plan:
        return plan(
            prepared.lengths, epochs=config.epochs, max_steps=config.max_steps, batch_size=config.batch_size or 1,
            grad_accum=config.grad_accum, seed=config.seed, capacity=capacity, processes=world_size(),
        )  # fmt: skip

    shortest = max(2048, config.max_length)
    if not method.packs:
        layout = laid_out(0)
    elif config.pack_length >= 0:
        layout = laid_out(config.pack_length)
    else:  # rows of few long samples cannot be levelled; longer ones can, and compute fewer tokens
        layout = laid_out(shortest)
        for times in (2, 4, 8):
            if layout.efficiency < LEAST_REAL:
                layout = max(layout, laid_out(times * shortest), key=lambda found: found.efficiency)
    return PlannedBatches(prepared.samples, layout)


def _sdt_channels(model: Any, data: PlannedBatches, options: dict[str, Any], rate: float) -> list[list[int]]:
    from mambacus.models.ssm_adapters import checked_options
    from mambacus.tuning.sdt import choose_channels

    return choose_channels(model, data, share=checked_options("sdt", options)["share"], rate=rate)


def _how(config: Config, device: torch.device, autocast: torch.dtype | None, rate: float) -> Any:
    from mambacus.tuning.trainer import Settings

    return Settings(
        config.out, device, autocast, rate, weight_decay=config.weight_decay, grad_accum=config.grad_accum,
        save_every=config.save_every, seed=config.seed, cuda_graph=config.cuda_graph,
        spike_stop=config.spike_stop,
    )  # fmt: skip


def _places(trained: Any, method: str) -> list[str]:
    """Return where the method trains, for the record and the screen."""
    if method == "full":
        return ["all"]
    config = getattr(trained, "peft_config", None)
    return sorted(config["default"].target_modules) if config else [method]


def _usable(tokenizer: Any, model: str) -> Any:
    if tokenizer is None:
        raise UserError(f"--model {model}: has no tokenizer; put tokenizer.json into the model's folder")
    return tokenizer


def _check_vocabulary(highest: int, model: Any, name: str) -> None:
    if highest >= model.config.vocab_size:
        raise UserError(
            f"--model {name}: its tokenizer gives token {highest}, its embedding has {model.config.vocab_size} rows; "
            "they do not belong together"
        )


def _identity(
    config: Config, rate: float, autocast: Any, device: Any, content: str, base_signature: Signature
) -> dict[str, Any]:
    """Return what decides the result of a run, and nothing else; a run may be resumed when it is equal."""
    from mambacus.runtime.outputs import fingerprint

    identity = dataclasses.asdict(config)
    for key in _WHERE_AND_HOW:
        del identity[key]
    return identity | {
        "lr": rate,
        "autocast": str(autocast),
        "device": device.type,
        "data": f"{config.data} {content}",
        "model": f"{config.model} {fingerprint(base_signature)}",
    }


def _claim(config: Config, identity: dict[str, Any]) -> Record | None:
    """Make ``--out`` this run's folder; return the record of a run that is finished already."""
    from mambacus.runtime.outputs import claim_directory
    from mambacus.tuning import processes

    if processes.is_main():
        claim_directory(config.out, "finetune", identity, resume=config.resume)
    processes.wait()
    return read_record(config.out / RECORD) if (config.out / RECORD).is_file() else None


def _announce(config: Config, parameters: dict[str, Any], counts: dict[str, Any], plan: Plan, rate: float) -> None:
    share = 100 * parameters["trainable"] / parameters["total"]
    print(
        f"{config.method}: {parameters['trainable']:,} of {parameters['total']:,} parameters train ({share:.2f} %): "
        f"{', '.join(parameters['targets'])}; peak rate {rate:g}"
    )
    dropped = "".join(f", {number} dropped ({reason})" for reason, number in counts["dropped"].items())
    split = f", {counts['split']} cut into pieces" if counts["split"] else ""
    print(
        f"data: {counts['kept']} of {counts['rows']} rows{dropped}{split}, {counts['duplicates']} repeated, "
        f"{counts['tokens']:,} tokens; {plan.steps} steps of {config.batch_size}"
    )
    if plan.efficiency < LEAST_REAL:
        print(
            f"packing: {plan.efficiency:.1%} of the computed tokens are real, the rest fills rows up to the longest; "
            "a larger --pack-length or --batch-size levels them, where the method packs"
        )


def _save(
    config: Config,
    kind: str,
    trained: Any,
    tokenizer: Any,
    base_signature: Signature,
    shared: dict[str, torch.Tensor] | None,
) -> None:
    """Write the result, from ``shared`` if the model is shared out; that of an attempt without a record is replaced."""
    import shutil

    from mambacus.models import save
    from mambacus.tuning.adapters import save_adapter
    from mambacus.tuning.sharding import plain_twin

    if kind == "model":
        shutil.rmtree(config.out / "model", ignore_errors=True)
        save(plain_twin(trained, shared) if shared else trained, config.out / "model", tokenizer)
        return
    shutil.rmtree(config.out / "adapter", ignore_errors=True)
    folder = Path(config.model).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else config.model
    save_adapter(trained, config.out / "adapter", base_model=base, base_signature=base_signature, tensors=shared)


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome; of several processes launched together, one speaks."""
    config = parse(Config, argv, "mambacus finetune", __doc__.splitlines()[0])
    record = run(config)
    if record.kind == "sweep":
        from mambacus.finetune_sweep import table

        print("\n".join([*table(record), f"record: {config.out / RECORD}"]))
        return
    from mambacus.finetune_check import summary
    from mambacus.tuning.processes import is_main

    if not is_main():
        return
    train = record.results["train"]
    print(
        f"{train['steps']} steps, loss {train['loss_first']:.3f} -> {train['loss_last']:.3f}, "
        f"{train['tokens_per_second']:,.0f} tokens/s, {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    for line in summary(record.results["check"]):
        print(line)
    print(f"{config.out / ('model' if config.method == 'full' else 'adapter')}  record: {config.out / RECORD}")
