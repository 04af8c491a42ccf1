"""``mambacus prompt tune``: tune the state that a prompt was compiled into, by gradient, the model frozen."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_record

if TYPE_CHECKING:
    from mambacus.models.state_files import StateFile
    from mambacus.tuning.data import Sample

RECORD, STATE, ADAPTER = "record.json", "prompt.state", "adapter"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus prompt tune``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE", metavar="M")
    state: Path = opt(help="state file of prompt compile, made with this model in float32", metavar="FILE.state")
    data: str = opt(help="as for finetune: JSONL file, wordproblems:N, a set under --data-dir, a hub id")
    out: Path = opt(help="folder for prompt.state, record.json, checkpoints and, with --offset, adapter", metavar="DIR")
    offset: bool = opt(False, "tune a state-offset adapter too: what every layer adds to its states")
    lr: float = opt(0.01, "peak learning rate", above=0)
    epochs: float = opt(1.0, "passes over the data", above=0)
    max_steps: int = opt(0, "optimiser steps; above 0 it overrides --epochs", least=0)
    batch_size: int = opt(16, "samples in one optimiser step", least=1)
    held_out: int = opt(64, "last rows of the data, kept from training to measure the loss on", least=1)
    max_length: int = opt(1024, "tokens of a sample; longer ones are dropped and counted", least=2)
    save_every: int = opt(100, "steps between checkpoints", least=1)
    tokenizer: str | None = opt(None, "tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")
    device: str = opt("auto", "auto, cpu or cuda")
    dtype: str = opt("float32", "of the matrix products: auto, float32 or bfloat16; state and weights are float32")
    seed: int = opt(0, "seed of the order and of generated data", least=0, most=MOST_SEED)
    resume: bool = opt(False, "continue this run from its last checkpoint")


def run(config: Config) -> Record:
    """Tune; leave ``prompt.state``, ``record.json``, ``checkpoints/`` and perhaps ``adapter/`` in ``--out``.

    Returns:
        A record of kind ``prompt-tune``: ``results`` as of a ``finetune`` record, and ``held_out`` (rows, loss of their
        answers in nats a token before and after) and ``state`` (bytes, largest change of a value).

    Raises:
        UserError: a state of another model, unreadable data, a folder that holds another run, or the audit stopped it.
    """
    check(config)
    watch = Stopwatch()
    import torch

    from mambacus.models import load
    from mambacus.models.primed import PrimedModel
    from mambacus.models.signature import signature
    from mambacus.models.state_files import read_state
    from mambacus.runtime.device import resolve_device
    from mambacus.runtime.outputs import claim_directory, fingerprint
    from mambacus.tuning import methods
    from mambacus.tuning.packing import PlannedBatches, plan
    from mambacus.tuning.trainer import Settings, choose_autocast, train

    device = resolve_device(config.device)
    autocast = choose_autocast(config.dtype, device)
    model, tokenizer = load(config.model, device, torch.float32, tokenizer=config.tokenizer, data_dir=config.data_dir)
    file = read_state(config.state, model, tokenizer)
    samples, kept_out, counts = _samples(config, file, tokenizer)
    base_signature = signature(model)
    model.requires_grad_(False)
    offset = methods.find_method("state-offset")
    if config.offset:
        offset.attach(model, methods.AdapterSettings())
    primed = PrimedModel(model, file.state, trained=True)
    identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_IDENTITY}
    identity |= {
        "model": fingerprint(base_signature),
        "from": f"{config.state.name} {_content((file.state.conv_state.float(), file.state.ssm_state))}",
        "data": f"{config.data} {_content(array for row in (*samples, *kept_out) for array in (row.ids, row.labels))}",
    }
    claim_directory(config.out, "prompt-tune", identity, resume=config.resume)
    if (config.out / RECORD).is_file():
        return read_record(config.out / RECORD)
    run_plan = plan(
        [*map(len, samples)], epochs=config.epochs, max_steps=config.max_steps, batch_size=config.batch_size,
        grad_accum=1, capacity=0, seed=config.seed,
    )  # fmt: skip
    how = Settings(
        config.out, device, autocast, config.lr, weight_decay=0.0, save_every=config.save_every, seed=config.seed
    )
    before = _loss(primed, kept_out, config.batch_size)
    results = train(
        primed, PlannedBatches(samples, run_plan), how, quiet_first=offset.quiet_first, resume=config.resume
    )
    after = _loss(primed, kept_out, config.batch_size)
    tuned = primed.start().detach()
    change = max(
        (getattr(tuned, name).cpu() - getattr(file.state, name)).abs().max().item()
        for name in ("conv_state", "ssm_state")
    )
    notes = {"made_by": "prompt tune", "from": file.notes, "held_out_loss": [before, after]}
    _save(config, model, tokenizer, dataclasses.replace(file, state=tuned, notes=notes), base_signature)
    results |= {
        "parameters": methods.count_parameters(primed),
        "data": counts,
        "held_out": {"rows": len(kept_out), "loss_before": before, "loss_after": after},
        "state": {"bytes": tuned.nbytes, "largest_change": change},
    }
    record = watch.record("prompt-tune", f"{Path(config.model).name} + tuned state", config, results)
    write_record(config.out / RECORD, record)
    return record


_NOT_IDENTITY = ("out", "state", "resume", "save_every", "data_dir", "device")


def _content(arrays: Iterable[Any]) -> str:
    """Return 16 digits that differ when any number of the arrays or tensors differs."""
    import numpy as np

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _samples(config: Config, file: StateFile, tokenizer: Any) -> tuple[list[Sample], list[Sample], dict[str, Any]]:
    """Return the samples to train on, those kept out, and the counts; texts begin where the compiled prompt ends."""
    from mambacus.prompts.asking import asked_with
    from mambacus.prompts.prompt import unframed
    from mambacus.tuning.data import Example, encode, read_examples

    rows = [*read_examples(config.data, data_dir=config.data_dir, seed=config.seed)]
    asked = asked_with(config.state, file, tokenizer, [unframed(row.prompt) for row in rows])
    examples = [Example(asked.framed(unframed(row.prompt)), row.completion) for row in rows]
    if len(examples) <= config.held_out:
        raise UserError(f"--held-out {config.held_out}: expected fewer than the rows of the data, {len(examples)}")
    samples, counts = encode(examples[: -config.held_out], tokenizer, max_length=config.max_length)
    kept_out, _ = encode(examples[-config.held_out :], tokenizer, max_length=config.max_length)
    return samples, kept_out, counts


def _loss(model: Any, samples: Sequence[Sample], batch_size: int) -> float:
    """Return the mean loss of the answers' tokens, in nats."""
    import torch

    from mambacus.tuning.packing import collate

    total, count = 0.0, 0
    model.eval()
    device = model.get_base_model().device
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            rows = samples[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([[row] for row in rows]).items()}
            total += float(model(**batch, loss_only=True, num_items_in_batch=1).loss)
            count += sum(len(row) - row.trained_from for row in rows)
    return total / count


def _save(config: Config, model: Any, tokenizer: Any, file: Any, base_signature: Any) -> None:
    """Write the tuned state, and the adapter it belongs to if there is one."""
    import shutil

    from mambacus.models.state_files import write_state
    from mambacus.tuning.adapters import save_adapter

    if config.offset:
        shutil.rmtree(config.out / ADAPTER, ignore_errors=True)
        folder = Path(config.model).expanduser()
        base = str(folder.resolve()) if folder.is_dir() else config.model
        save_adapter(model, config.out / ADAPTER, base_model=base, base_signature=base_signature)
    write_state(config.out / STATE, file, model, tokenizer)


def main(argv: Sequence[str]) -> None:
    """Run ``mambacus prompt tune``."""
    config = parse(Config, argv, "mambacus prompt tune", "Tune a compiled state by gradient, the model frozen.")
    results = run(config).results
    train, kept_out, parameters = results["train"], results["held_out"], results["parameters"]
    share = 100 * parameters["trainable"] / parameters["total"]
    print(
        f"{parameters['trainable']:,} numbers tuned ({share:.2f} %), {train['steps']} steps, {train['seconds']:.0f} s"
    )
    print(
        f"loss of the answers on {kept_out['rows']} held-out rows: {kept_out['loss_before']:.3f} -> "
        f"{kept_out['loss_after']:.3f} nats a token"
    )
    adapter = f"   with --adapter {config.out / ADAPTER}" if config.offset else ""
    print(f"state: {config.out / STATE}{adapter}")
