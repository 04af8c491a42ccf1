"""``mambacus prompt compile``: read the fixed part of a prompt once and keep the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record

CHECKED = 16  # questions on which state and plain prompt are compared
# Of next-token log-probabilities, in nats. bfloat16: two steps of a logit between 16 and 32; on `tiny` it is 0.07.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}
LEAST = -9.2  # log-probability of the tokens that are compared: of at least 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus prompt compile``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE", metavar="M")
    prompt: Path = opt(help="prompt file, as prompt optimise writes it", metavar="FILE.yaml")
    out: Path = opt(
        help="state file to write; its record goes beside it as <name>.json: FILE.state.json", metavar="FILE.state"
    )
    adapter: Path | None = opt(None, "folder of a PEFT adapter to attach", metavar="DIR")
    tokenizer: str | None = opt(None, "tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, "data folder with tokenizer/20B_tokenizer.json", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    overwrite: bool = opt(False, "replace an existing state")


def run(config: Config) -> Record:
    """Compile, compare with the plain prompt, and write the state file and the record.

    Returns:
        A record of kind ``prompt-compile``: ``results`` holds ``prefix_tokens``, ``state_bytes``, ``file_bytes``,
        ``gate`` (questions compared, largest difference of next-token log-probabilities, tolerance) and ``shots``.

    Raises:
        UserError: a file that is no prompt, a prompt whose fixed part the tokenizer joins with the question, an
            existing output, or a state that does not agree with the plain prompt.
    """
    record_path = config.out.with_name(f"{config.out.name}.json")  # <stem>.json may be the search's
    claim_file(config.out, overwrite=config.overwrite, items=False)
    claim_file(record_path, overwrite=config.overwrite)
    watch = Stopwatch()
    from mambacus.data import wordproblems
    from mambacus.inference import Engine
    from mambacus.models import MambaState, load
    from mambacus.models.state_files import StateFile, write_state
    from mambacus.prompts.prompt import compile_tokens, read_prompt
    from mambacus.runtime.device import resolve_device, resolve_dtype

    prompt = read_prompt(config.prompt)
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    model, tokenizer = load(
        config.model, device, dtype, config.adapter, tokenizer=config.tokenizer, data_dir=config.data_dir
    )
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    questions = [problem.question for problem in wordproblems.generate(CHECKED, "train", seed=1)]
    ids = compile_tokens(prompt, tokenizer, questions)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    state = Engine(model, tokenizer).prefill(ids) if ids else MambaState.zeros(base.config, 1, device, dtype)
    gate = {
        "questions": len(questions),
        "max_logprob_difference": _difference(model, tokenizer, prompt, ids, state, questions),
        "tolerance": TOLERANCES[config.dtype],
    }
    if not gate["max_logprob_difference"] <= gate["tolerance"]:
        raise UserError(
            f"{config.prompt}: the compiled state gives other log-probabilities than the plain prompt, by "
            f"{gate['max_logprob_difference']:.1e}; allowed in {config.dtype}: {gate['tolerance']:.0e}"
        )
    notes = {"made_by": "prompt compile", "gate": gate}
    write_state(config.out, StateFile(state, tuple(ids), prompt.as_dict(), notes), model, tokenizer)
    results = {
        "prefix_tokens": len(ids),
        "shots": len(prompt.exemplars),
        "state_bytes": state.nbytes,
        "file_bytes": config.out.stat().st_size,
        "gate": gate,
    }
    record = watch.record("prompt-compile", Path(config.model).name, config, results)
    write_record(record_path, record)
    return record


def _difference(
    model: Any, tokenizer: Any, prompt: Any, ids: Sequence[int], state: Any, questions: Sequence[str]
) -> float:
    """Return the largest difference of next-token log-probabilities, over the tokens that `LEAST` leaves."""
    import torch

    from mambacus.prompts.prompt import encode

    largest = 0.0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.device
    with torch.inference_mode():
        for question in questions:
            whole = torch.tensor([encode(tokenizer, prompt.text(question))], device=device)
            last = torch.tensor([[whole.shape[1] - 1]], device=device)
            plain = model(input_ids=whole, logits_at=last).logits.float().log_softmax(-1)
            rest = whole[:, len(ids) :]
            forked = model(input_ids=rest, state=state.to(device, base.dtype), logits_at=last - len(ids))
            apart = (forked.logits.float().log_softmax(-1) - plain).abs()
            largest = max(largest, apart[plain > LEAST].max().item())
    return largest


def main(argv: Sequence[str]) -> None:
    """Run ``mambacus prompt compile``."""
    config = parse(Config, argv, "mambacus prompt compile", "Read the fixed part of a prompt once and keep the state.")
    results = run(config).results
    gate = results["gate"]
    print(f"{results['prefix_tokens']} tokens, {results['shots']} worked examples -> {config.out}")
    print(f"{results['file_bytes'] / 1e6:.2f} MB; every question that goes on from it reads so many tokens fewer")
    if not results["prefix_tokens"]:
        print("no text stands before the question: the state is that of nothing, a start for prompt tune alone")
    print(
        f"same next-token log-probabilities as the plain prompt on {gate['questions']} questions "
        f"(largest difference {gate['max_logprob_difference']:.1e}, allowed {gate['tolerance']:.0e})"
    )
