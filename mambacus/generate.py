"""``mambacus generate``: continue a prompt, a long file, many prompts, or a saved state, with a Mamba model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.flags import weights_flag
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_jsonl_atomic, write_record
from mambacus.runtime.sampling import SamplingFlags

if TYPE_CHECKING:
    from mambacus.inference import Completion, Engine, Request, SamplingParams
    from mambacus.inference.engine import Prompt
    from mambacus.models.state_files import StateFile


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags):
    """What to continue, and how."""

    prompt: str | None = opt(None, help="text to continue, or - to read it from standard input", metavar="TEXT|-")
    prompt_file: Path | None = opt(None, help="continue this text, however long; memory stays", metavar="FILE")
    prompts: str | None = opt(None, help="one JSON object with a prompt a line, or -", metavar="FILE.jsonl|-")
    model: str = opt("tiny", help="tiny, a folder, a hub id or random:SIZE")
    adapter: str | None = opt(None, help="PEFT adapter folder to attach", metavar="DIR")
    state: Path | None = opt(None, help="go on from this saved state", metavar="FILE")
    save_state: Path | None = opt(None, help="save the state after the completion here", metavar="FILE")
    samples: int = opt(1, help="number of completions of each prompt", least=1)
    logprobs: int | None = opt(None, help="tell each token's log-probability, and those of the k likeliest", least=0)
    stream: bool | None = opt(None, help="print tokens as they come (default: to a terminal)")
    batch_size: int = opt(16, help="completions decoded at once", least=1)
    prefill_tokens: int = opt(4096, help="prompt tokens read at once", least=1)
    device: str = opt("auto", help="auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", help="dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = weights_flag()
    tokenizer: str | None = opt(None, help="tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, help="data folder with tokenizer/20B_tokenizer.json", metavar="DIR")
    out: Path | None = opt(None, help="write the record here; with --prompts, completions as .jsonl", metavar="FILE")
    overwrite: bool = opt(False, help="replace an existing output or state")

    @property
    def streams(self) -> bool:
        """Whether the text is printed as it comes."""
        return sys.stdout.isatty() and self.samples == 1 and not self.prompts if self.stream is None else self.stream


def run(config: Config, tell: Callable[[str], object] | None = None) -> Record:
    """Generate the completions.

    ``results`` of one prompt: ``prompt``, ``completions``, counts, seconds, speed, ``peak_memory_bytes``. Of many:
    ``prompts``, ``failed`` (line number -> why) and the same figures; the completions stand in ``--out``, or on
    standard output.

    Args:
        config: the flags.
        tell: called with every piece of the one completion's text as it comes.

    Raises:
        UserError: no such model, adapter or state, a value out of range, a state of another model, a prompt that is not
            text, a line that cannot be honoured, a file that exists; after the writing, prompts without a completion.
    """
    watch = Stopwatch()
    _check(config)
    from mambacus.inference import Engine, SamplingParams
    from mambacus.models import load
    from mambacus.models.state_files import read_state
    from mambacus.runtime.device import peak_memory_bytes, resolve_device, resolve_dtype

    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    params = SamplingParams(**config.options(), n=config.samples, logprobs=config.logprobs)
    prompt = None if config.prompt is None else _prompt(config.prompt)
    model, tokenizer = load(
        config.model, device, dtype, config.adapter, weights=config.weights, tokenizer=config.tokenizer,
        data_dir=config.data_dir,
    )  # fmt: skip
    before = read_state(config.state, model, tokenizer) if config.state else None
    engine = Engine(model, tokenizer, batch_size=config.batch_size, prefill_tokens=config.prefill_tokens)
    if config.prompts:
        results = _many(config, engine, params, before)
    else:
        results = _one(config, engine, params, before, prompt, tell)
    results |= {
        "prompt_tokens": engine.stats.prompt_tokens,
        "generated_tokens": engine.stats.generated_tokens,
        "prefill_seconds": engine.stats.prefill_seconds,
        "decode_seconds": engine.stats.decode_seconds,
        "tokens_per_second": engine.stats.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    if config.weights:
        results["quantisation"] = dataclasses.asdict(model.quantisation)
    record = watch.record("generate", config.model, config, results)
    if config.out:
        write_record(config.out.with_suffix(".json") if config.prompts else config.out, record)
    for line, reason in results.get("failed", {}).items():
        raise UserError(
            f"{len(results['failed'])} of {results['prompts']} prompts failed; first, line {line}: {reason}"
        )
    return record


def _check(config: Config) -> None:
    """Refuse flags that do not go together, and outputs that exist."""
    faults = []
    given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(config, name) is not None]
    if len(given) != 1:
        got = " and ".join("--" + name.replace("_", "-") for name in given) or "none"
        faults.append(f"expected one of --prompt, --prompt-file and --prompts, got {got}")
    if config.save_state and (config.samples > 1 or config.prompts):
        faults.append("--save-state keeps one state; it needs one prompt and --samples 1")
    if config.stream and (config.samples > 1 or config.prompts):
        faults.append("--stream shows one completion as it comes; it needs one prompt and --samples 1")
    if config.prompts and config.out and config.out.suffix != ".jsonl":
        faults.append(f"--out {config.out}: expected a name that ends in .jsonl; the record goes beside it as .json")
    check(config, *faults)
    outputs = [("--out", config.out), ("--save-state", config.save_state)]
    if config.prompts and config.out:
        outputs.append(("--out", config.out.with_suffix(".json")))
    for flag, path in outputs:
        if path is not None:
            claim_file(path, overwrite=config.overwrite, flag=flag)


def _one(
    config: Config,
    engine: Engine,
    params: SamplingParams,
    before: StateFile | None,
    text: str | None,
    tell: Callable[[str], object] | None,
) -> dict[str, Any]:
    """Complete one prompt; return its part of the results."""
    from mambacus.inference.long_text import encode_file

    prompt: Prompt
    if config.prompt_file is None:
        assert text is not None
        prompt = text
    else:
        if engine.tokenizer is None:
            raise UserError(f"--prompt-file {config.prompt_file}: the model has no tokenizer")
        prompt = encode_file(engine.tokenizer, config.prompt_file, "--prompt-file")
    [request] = engine.requests(
        [prompt], params, before.state if before else None, stream=tell is not None,
        keep_state=config.save_state is not None, state_ids=before.token_ids if before else (),
    )  # fmt: skip
    if tell is not None and text is not None:
        tell(text)
    completions = _complete(engine, request, tell)
    if config.save_state:
        _save(config.save_state, engine, before, request.ids, completions[0], params.stop)
    source = {"prompt": text} if text is not None else {"prompt_file": str(config.prompt_file)}
    return {**source, "completions": [completion.as_dict() for completion in completions]}


def _complete(engine: Engine, request: Request, tell: Callable[[str], object] | None) -> list[Completion]:
    """Run one request, with a progress bar if its prompt is read in several passes."""
    from tqdm import tqdm

    found: dict[int, Completion] = {}
    total = len(request.ids)
    with tqdm(
        total=total, desc="reading", unit=" tokens", disable=None if total > engine.prefill_tokens else True
    ) as bar:

        def count(tokens: int) -> None:
            bar.update(tokens)
            if bar.n >= total:
                bar.close()

        engine.on_read = count
        for piece in engine.run([request]):
            if piece.error is not None:
                raise UserError(piece.error)
            if tell is not None:
                tell(piece.text)
            if piece.completion is not None:
                found[piece.sample] = piece.completion
    engine.on_read = None
    return [found[number] for number in sorted(found)]


def _save(
    path: Path,
    engine: Engine,
    before: StateFile | None,
    ids: Sequence[int],
    completion: Completion,
    stop: Sequence[str],
) -> None:
    """Write the state after the prompt and the text that was shown, without what ended it."""
    from mambacus.inference.text import shown_tokens, stop_tokens
    from mambacus.models.state_files import StateFile, write_state

    state, read = completion.state, completion.token_ids[:-1]
    if completion.finish_reason == "length":
        read = completion.token_ids
        state = engine.prefill(read[-1:], state)
    elif completion.finish_reason == "stop" and completion.token_ids[-1] not in stop_tokens(engine.tokenizer, stop):
        read = shown_tokens(engine.tokenizer, completion.token_ids, completion.text)
        state = engine.prefill(read, completion.prompt_state) if read else completion.prompt_state
    assert state is not None
    tokens = (*(before.token_ids if before else ()), *ids, *read)
    write_state(path, StateFile(state, tokens), engine.model, engine.tokenizer)


def _many(config: Config, engine: Engine, params: SamplingParams, before: StateFile | None) -> dict[str, Any]:
    """Complete every line of a file; write them, in order, when all are done.

    Raises:
        UserError: a line that cannot be honoured; nothing was completed then.
    """
    from tqdm import tqdm

    from mambacus.inference.prompt_lines import read_prompts

    assert config.prompts is not None
    lines = read_prompts(config.prompts, params, engine, continues=before is not None)
    requests = engine.requests(
        [line.prompt for line in lines], [line.params for line in lines], before.state if before else None,
        state_ids=before.token_ids if before else (),
    )  # fmt: skip
    found: list[dict[int, Completion]] = [{} for _ in lines]
    errors: dict[int, str] = {}
    with tqdm(total=sum(line.params.n for line in lines), desc="completions", disable=None) as bar:
        for piece in engine.run(sorted(requests, key=lambda request: -len(request.ids))):
            bar.update()
            if piece.completion is not None:
                found[piece.prompt][piece.sample] = piece.completion
            elif piece.error is not None:
                errors[piece.prompt] = piece.error
    items = []
    for number, (line, request) in enumerate(zip(lines, requests, strict=True)):
        item: dict[str, Any] = {"line": line.number, "id": line.id}
        item["prompt" if isinstance(line.prompt, str) else "prompt_ids"] = line.prompt
        item["prompt_tokens"] = len(request.ids)
        item["completions"] = [found[number][sample].as_dict() for sample in sorted(found[number])]
        items.append(item | ({"error": errors[number]} if number in errors else {}))
    _write(config, items)
    return {"prompts": len(lines), "failed": {str(lines[number].number): errors[number] for number in sorted(errors)}}


def _write(config: Config, items: list[dict[str, Any]]) -> None:
    import json

    if config.out is not None:
        write_jsonl_atomic(config.out, items)
        return
    for item in items:
        print(json.dumps(item, ensure_ascii=False))


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
    config = parse(Config, argv, "mambacus generate", __doc__ or "")
    streams = config.streams
    results = run(config, _tell if streams else None).results
    if streams:
        print(flush=True)
    elif not config.prompts:
        _show(results)
    if config.logprobs is not None and not config.prompts:
        _show_scores(results["completions"])
    print(f"{results['generated_tokens']} tokens, {results['tokens_per_second']:.1f} per second", file=sys.stderr)


def _tell(text: str) -> None:
    print(text, end="", flush=True)


def _show(results: dict[str, Any]) -> None:
    completions = results["completions"]
    for number, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            print(f"--- {number} of {len(completions)} ({completion['finish_reason']})")
        print(results.get("prompt", "") + completion["text"])


def _show_scores(completions: list[dict[str, Any]]) -> None:
    """Print a line for each token on standard error: id, log-probability, and the likeliest tokens with theirs."""
    for completion in completions:
        for score in completion["logprobs"]:
            top = "  ".join(f"{token}:{value:.3f}" for token, value in score["top"])
            print(f"{score['token_id']:>8} {score['logprob']:9.3f}  {top}".rstrip(), file=sys.stderr)
