"""``mambacus generate``: continue a prompt, or a saved state, with a Mamba model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record


@dataclasses.dataclass(frozen=True)
class Config:
    """What to continue, and how."""

    prompt: str = opt(help="text to continue, or - to read it from standard input", metavar="TEXT|-")
    model: str = opt("tiny", help="tiny, a folder, a hub id or random:SIZE")
    adapter: str | None = opt(None, help="PEFT adapter folder to attach", metavar="DIR")
    state: Path | None = opt(None, help="go on from this saved state", metavar="FILE")
    save_state: Path | None = opt(None, help="save the state after the completion here", metavar="FILE")
    max_new_tokens: int = opt(64, help="length limit in tokens", least=1)
    temperature: float = opt(0.0, help="0 takes the likeliest token", least=0)
    top_k: int = opt(0, help="draw from the k likeliest tokens, 0 for all", least=0)
    top_p: float = opt(1.0, help="draw from the likeliest tokens that sum to this probability", above=0, most=1)
    min_p: float = opt(0.0, help="draw from tokens at least this fraction as likely as the likeliest", least=0, most=1)
    repetition_penalty: float = opt(1.0, help="divide the logits of seen tokens by this", above=0)
    n: int = opt(1, help="number of completions", least=1)
    stop: tuple[str, ...] = opt((), help=r"strings that end a completion; \n and \t are understood")
    seed: int = opt(0, help="seed of the draws")
    device: str = opt("auto", help="auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", help="dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = opt(
        None, help="int8 or int4: quantise the large matrices, on a CPU; the cost in perplexity is printed",
        choices=("int8", "int4"),
    )  # fmt: skip
    tokenizer: str | None = opt(None, help="tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, help="data folder with tokenizer/20B_tokenizer.json", metavar="DIR")
    out: Path | None = opt(None, help="write the record here", metavar="FILE.json")
    overwrite: bool = opt(False, help="replace an existing record or state")


def run(config: Config) -> Record:
    """Generate the completions; ``results`` holds them with token counts and speed.

    Raises:
        UserError: no such model, adapter or state, a value out of range, a state of another model, a prompt that is not
            text, or a file that exists.
    """
    watch = Stopwatch()
    from mambacus.inference import Engine, SamplingParams
    from mambacus.models import load
    from mambacus.models.state_files import StateFile, read_state, write_state
    from mambacus.runtime.device import resolve_device, resolve_dtype

    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition_penalty=config.repetition_penalty, n=config.n, seed=config.seed,
        stop=[text.replace(r"\n", "\n").replace(r"\t", "\t") for text in config.stop],
    )  # fmt: skip
    if config.save_state and config.n > 1:
        raise UserError(f"--save-state keeps one state; it needs --n 1, got {config.n}")
    for flag, path in (("--out", config.out), ("--save-state", config.save_state)):
        if path is not None:
            claim_file(path, overwrite=config.overwrite, flag=flag)
    prompt = _prompt(config.prompt)
    model, tokenizer = load(
        config.model, device, dtype, config.adapter, weights=config.weights, tokenizer=config.tokenizer,
        data_dir=config.data_dir,
    )  # fmt: skip
    before = read_state(config.state, model, tokenizer) if config.state else None
    state = before.state if before else None
    engine = Engine(model, tokenizer)
    completions = engine.generate([prompt], params, state)[0]
    results = {
        "prompt": prompt,
        "completions": [dataclasses.asdict(completion) for completion in completions],
        "prompt_tokens": engine.stats.prompt_tokens,
        "generated_tokens": engine.stats.generated_tokens,
        "prefill_seconds": engine.stats.prefill_seconds,
        "decode_seconds": engine.stats.decode_seconds,
        "tokens_per_second": engine.stats.tokens_per_second,
    }
    if config.weights:
        results["quantisation"] = dataclasses.asdict(model.quantisation)
    if config.save_state:
        # Read again rather than carried out of the batch: once per command, and the engine stays simple.
        read = [*engine.encode(prompt, continues=state is not None), *completions[0].token_ids]
        ids = (*(before.token_ids if before else ()), *read)
        write_state(config.save_state, StateFile(engine.prefill(read, state), ids), model, tokenizer)
    record = watch.record("generate", config.model, config, results)
    if config.out:
        write_record(config.out, record)
    return record


def _prompt(given: str) -> str:
    """Return the prompt, read from standard input for ``-``.

    Raises:
        UserError: it is not UTF-8 text.
    """
    try:
        text = sys.stdin.read().removesuffix("\n") if given == "-" else given
        text.encode()  # an argument with foreign bytes holds lone surrogates, which no tokenizer takes
    except UnicodeError:
        raise UserError("--prompt: expected UTF-8 text, got other bytes") from None
    return text


def main(argv: Sequence[str]) -> None:
    """Run the verb: the completions on standard output, counts and speed on standard error."""
    record = run(parse(Config, argv, "mambacus generate", __doc__ or ""))
    completions = record.results["completions"]
    for number, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            print(f"--- {number} of {len(completions)} ({completion['finish_reason']})")
        print(record.results["prompt"] + completion["text"])
    print(
        f"{record.results['generated_tokens']} tokens, {record.results['tokens_per_second']:.1f} per second",
        file=sys.stderr,
    )
