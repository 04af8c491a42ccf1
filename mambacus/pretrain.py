"""``mambacus pretrain``: train a small Mamba from scratch on text and arithmetic, as the embedded model was."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.data.sources import TEXT_FILES, text_files
from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_record

if TYPE_CHECKING:
    from mambacus.data.corpus import Stream
    from mambacus.models import MambaLM
    from mambacus.tuning.pretraining import Plan, Pretraining

RECORD = "record.json"
_VALID_TOKENS = 200_000
_PROBED_SUMS = 400
_SAMPLE_PROMPTS = ("The old man", "Once upon a time there was a", "Tom had 12 marbles. He found 7 more.", "17 + 25 =")


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus pretrain``."""

    out: Path = opt(help="folder for model, record, tokens and checkpoint", metavar="DIR")
    data_dir: Path = opt(help="folder with text/ (see mambacus/data/sources.py)", metavar="DIR")
    resume: bool = opt(False, "continue this run from its checkpoint")
    device: str = opt("auto", "auto, cpu or cuda")
    d_model: int = opt(256, "width of the model", least=1)
    n_layer: int = opt(8, "number of blocks", least=1)
    d_state: int = opt(16, "numbers in the state of one channel", least=1)
    vocab_size: int = opt(4096, "tokens of the tokenizer, which are stored in 16 bits", least=258, most=65536)
    tokenizer: Path | None = opt(None, "tokenizer.json to use instead of training one", metavar="FILE")
    steps: int = opt(10_000, "optimiser steps, unless --max-minutes ends the run before", least=1)
    max_minutes: float = opt(0.0, "minutes of training after which the schedule is at its end (0: no limit)", least=0)
    batch: int = opt(128, "rows of one step", least=1)
    seqlen: int = opt(512, "tokens of a row", least=1)
    lr: float = opt(3e-3, "peak learning rate", above=0)
    weight_decay: float = opt(0.1, "AdamW's, on matrices only; never on A_log, D, norms, biases", least=0)
    warmup: float = opt(0.02, "share of the run in which the rate rises", least=0, most=1)
    decay: float = opt(0.4, "share of the run, at its end, in which the rate falls to 0", least=0, most=1)
    clip: float = opt(1.0, "largest norm of the gradient", above=0)
    text_weight: float = opt(0.4, "share of books and stories", least=0)
    narratives_weight: float = opt(0.45, "share of generated stories with sums", least=0)
    sums_weight: float = opt(0.15, "share of generated and rewritten sums", least=0)
    narratives: int = opt(2_000_000, "stories to generate", least=0)
    sum_sheets: int = opt(150_000, "sheets of sums to generate", least=0)
    max_text_chars: int = opt(0, "read no more than this many characters of text (0: all)", least=0)
    seed: int = opt(0, "seed of generated text, initial weights and batches", least=0, most=MOST_SEED)
    workers: int = opt(0, "processes that make tokens (0: one a core)", least=0)
    log_every: int = opt(50, "steps between log lines", least=1)
    valid_every: int = opt(1_000, "steps between validations", least=1)
    save_every: int = opt(1_000, "steps between checkpoints", least=1)
    compile: bool = opt(False, "run the model through torch.compile")
    cuda_graph: str = opt(
        "auto",
        "record the pass as a CUDA graph and repeat it: less work for the CPU (auto: on a GPU)",
        choices=("auto", "on", "off"),
    )


def run(config: Config) -> Record:
    """Make tokenizer and tokens, train, and leave ``model/`` (Hugging Face format) and ``record.json`` in ``--out``.

    Results of the record: ``train`` and ``history`` as in `finetune`; ``corpus`` (tokens, documents and bytes of each
    stream), ``validation`` (a list, one entry each validation) and ``samples``.

    Raises:
        UserError: a wrong setting, missing data, a folder that holds another run, or a loss that is not finite.
    """
    import torch

    from mambacus.data.tokenizer import EOS_ID, PAD_ID
    from mambacus.models import MambaConfig
    from mambacus.models.registry import random_model
    from mambacus.ops.dispatch import which_kernels
    from mambacus.runtime.device import resolve_device
    from mambacus.runtime.outputs import claim_directory
    from mambacus.tuning.pretraining import Mixture, Pretraining, samples

    watch = Stopwatch()
    _check(config)
    device = resolve_device(config.device)
    identity = dataclasses.asdict(config)
    for key in ("out", "resume", "data_dir", "device", "workers", "log_every", "save_every", "compile", "cuda_graph"):
        del identity[key]
    claim_directory(config.out, "pretrain", identity | {"device": device.type}, resume=config.resume)
    if (config.out / RECORD).is_file():
        return read_record(config.out / RECORD)

    tokenizer = _tokenizer(config)
    streams = _streams(config)
    for name, stream in streams.items():
        print(f"{name}: {len(stream.tokens):,} tokens, {stream.documents:,} documents", flush=True)
    shape = MambaConfig(
        d_model=config.d_model, n_layer=config.n_layer, d_state=config.d_state, vocab_size=config.vocab_size,
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    model = random_model(shape, config.seed).to(device)
    plan = _plan(config)
    mixture = Mixture({name: s.tokens for name, s in streams.items()}, plan.weights, config.seqlen, EOS_ID, device)
    training = Pretraining(model, mixture, plan, config.out, compiled=config.compile,
                           cuda_graph=config.cuda_graph)  # fmt: skip
    if training.restore():
        print(f"goes on from step {training.step}", flush=True)
    made_ready = watch.seconds
    _train(training, config, tokenizer, streams)
    _export(config, model, tokenizer)
    results = training.summary() | {
        "parameters": {"total": sum(parameter.numel() for parameter in model.parameters())},
        "preparation_seconds": round(made_ready, 1),
        "corpus": {name: {"tokens": len(stream.tokens)} | stream.about() for name, stream in streams.items()},
        "samples": samples(model, tokenizer, _SAMPLE_PROMPTS, EOS_ID),
        "torch_autocast": "bfloat16" if device.type == "cuda" else "none",
        "torch_version": torch.__version__,
        "ran_on": which_kernels(device),
    }
    record = watch.record("pretrain", config.out.name, config, results)
    write_record(config.out / "model" / "training_record.json", record)
    write_record(config.out / RECORD, record)
    return record


def _check(config: Config) -> None:
    """Check the settings, naming all faults at once, and that the text is there."""
    faults = []
    if config.warmup + config.decay > 1:
        faults.append(
            f"--warmup and --decay: expected shares of at most 1 together, got {config.warmup}, {config.decay}"
        )
    if config.compile and config.cuda_graph == "on":
        faults.append("--cuda-graph on and --compile: expected one of them")
    if config.text_weight + config.narratives_weight + config.sums_weight == 0:
        faults.append("--text-weight, --narratives-weight, --sums-weight: expected one above 0")
    check(config, *faults)
    for name in TEXT_FILES:
        text_files(config.data_dir, name)


def _plan(config: Config) -> Plan:
    from mambacus.tuning.pretraining import Plan

    weights = {"text": config.text_weight, "narratives": config.narratives_weight, "sums": config.sums_weight}
    return Plan(
        steps=config.steps, max_minutes=config.max_minutes, batch=config.batch, seqlen=config.seqlen,
        learning_rate=config.lr, weight_decay=config.weight_decay, warmup=config.warmup, decay=config.decay,
        clip=config.clip, weights=weights, seed=config.seed, log_every=config.log_every, save_every=config.save_every,
    )  # fmt: skip


def _tokenizer(config: Config) -> Any:
    """Return the tokenizer in ``--out``, made there first: trained, or copied from ``--tokenizer``."""
    from tokenizers import Tokenizer

    from mambacus.data.corpus import tokenizer_sample
    from mambacus.data.tokenizer import EOS_ID, EOS_TOKEN, PAD_ID, PAD_TOKEN, train_tokenizer, transformers_tokenizer

    path = config.out / "tokenizer.json"
    if not path.exists():
        if config.tokenizer is None:
            made = train_tokenizer(tokenizer_sample(config.data_dir, config.seed), config.vocab_size)
        elif config.tokenizer.is_file():
            made = Tokenizer.from_file(str(config.tokenizer))
        else:
            raise UserError(f"--tokenizer: no such file: {config.tokenizer}")
        made.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    ids = [tokenizer.token_to_id(EOS_TOKEN), tokenizer.token_to_id(PAD_TOKEN)]
    if ids != [EOS_ID, PAD_ID] or tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"--tokenizer: expected {config.vocab_size} tokens with {EOS_TOKEN} = {EOS_ID} and {PAD_TOKEN} = {PAD_ID}, "
            f"got {tokenizer.get_vocab_size()} tokens and {ids}"
        )
    return transformers_tokenizer(tokenizer)


def _streams(config: Config) -> dict[str, Stream]:
    from mambacus.data.corpus import Recipe, build_streams

    recipe = Recipe(config.narratives, config.sum_sheets, config.seed, config.max_text_chars)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return build_streams(
        config.data_dir, config.out / "tokenizer.json", recipe, config.out / "tokens", config.workers or cores
    )


def _train(training: Pretraining, config: Config, tokenizer: Any, streams: dict[str, Stream]) -> None:
    """Train to the end with validations on the way; the time they take does not count."""
    while True:
        due = training.step > 0 and (training.step % config.valid_every == 0 or training.progress >= 1)
        if due and training.step not in [entry["step"] for entry in training.validation]:
            entry = {"step": training.step} | _validate(training.model, training.plan, tokenizer, streams)
            training.validation.append(entry)
            print(_in_words(entry), flush=True)
        if training.progress >= 1:
            break
        training.run_until(training.step - training.step % config.valid_every + config.valid_every)
    training.save()


def _validate(model: MambaLM, plan: Plan, tokenizer: Any, streams: dict[str, Stream]) -> dict[str, Any]:
    from mambacus.data.corpus import VALID_STREAMS
    from mambacus.data.tokenizer import EOS_ID, PAD_ID
    from mambacus.tuning.pretraining import perplexity, sums_right

    result: dict[str, Any] = {
        name: perplexity(model, streams[name].tokens, streams[name].text_bytes, plan, EOS_ID, _VALID_TOKENS)
        for name in VALID_STREAMS
    }
    right = {sign: sums_right(model, tokenizer, sums, EOS_ID, PAD_ID) for sign, sums in _probe().items()}
    return result | {"sums_right": {sign: round(share, 4) for sign, share in right.items()}}


def _probe() -> dict[str, list[tuple[str, str]]]:
    """Return the sums of the probe by sign: prompts such as ``17 + 25 =`` and results such as `` 42``."""
    from mambacus.data.arithmetic import fact

    rng = random.Random("probe")
    sums: dict[str, dict[str, str]] = {sign: {} for sign in "+-*/"}
    while any(len(part) < _PROBED_SUMS // 4 for part in sums.values()):
        a, sign, b, result = fact(rng)
        if len(sums[sign]) < _PROBED_SUMS // 4:
            sums[sign][f"{a} {sign} {b} ="] = f" {result}\n"
    return {sign: [*part.items()] for sign, part in sums.items()}


def _in_words(entry: dict[str, Any]) -> str:
    scores = [f"{name} {value['perplexity']:.2f}" for name, value in entry.items() if name.endswith("_valid")]
    sums = " ".join(f"{sign} {100 * share:.0f} %" for sign, share in entry["sums_right"].items())
    return f"step {entry['step']}  perplexity: {', '.join(scores)}  sums right: {sums}"


def _export(config: Config, model: MambaLM, tokenizer: Any) -> None:
    """Write the model in bfloat16 (A_log, D and dt_proj.bias in float32) with its tokenizer."""
    import shutil

    import torch

    from mambacus.models import save

    folder = config.out / "model"
    if folder.exists():  # of an earlier attempt that died before its record
        shutil.rmtree(folder)
    model.to(torch.bfloat16)
    save(model, folder, tokenizer)


def main(argv: Sequence[str]) -> None:
    """Parse flags, run, print where the model is."""
    config = parse(Config, argv, "mambacus pretrain", __doc__ or "")
    record = run(config)
    train = record.results["train"]
    print(f"{train['steps']} steps, {train['tokens']:,} tokens in {train['seconds']:.0f} s: {config.out / 'model'}")
