"""What a step makes a model do: tokens read, generated and trained, counted from the recipe before anything runs.

Averages are in tokens of the GPT-NeoX tokenizer, which the published models share; `token_factor` turns them into those
of others. They were counted over the first 300 documents of each set as lm_eval renders them (a test compares them with
local data); data that is here is counted by its rows, data that is not by its published size.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from mambacus.studies.plan import Step


@dataclasses.dataclass(frozen=True)
class Task:
    """An lm_eval task in averages of one document.

    Attributes:
        documents: of the published split.
        file: the split below ``--data-dir``.
        shared: tokens of the contexts, each read once.
        rest: tokens of all continuations.
        separate: tokens if every request is read on its own.
        generated: tokens of an answer that the model writes; 0 for scored choices.
    """

    documents: int
    file: str
    shared: float
    rest: float = 0.0
    separate: float = 0.0
    generated: float = 0.0


TASKS = {
    "text_sample": Task(60, "", 245),
    "wikitext": Task(62, "zeroshot/wikitext/test.jsonl", 4471),
    "lambada_standard": Task(5153, "zeroshot/lambada_standard/test.jsonl", 81, 2, 82),
    "lambada_openai": Task(5153, "zeroshot/lambada_openai/test.jsonl", 80, 1, 82),
    "arc_easy": Task(2376, "zeroshot/arc_easy/test.jsonl", 28, 18, 130),
    "arc_challenge": Task(1172, "zeroshot/arc_challenge/test.jsonl", 31, 23, 148),
    "hellaswag": Task(10042, "zeroshot/hellaswag/validation.jsonl", 30, 56, 177),
    "cola": Task(1043, "zeroshot/cola/validation.jsonl", 22, 2, 45),
    "openbookqa": Task(500, "zeroshot/openbookqa/test.jsonl", 12, 14, 62),
    "mathqa": Task(2985, "zeroshot/mathqa/test.jsonl", 44, 10, 230),
    "winogrande": Task(1267, "zeroshot/winogrande/validation.jsonl", 34, 11, 45),
    "piqa": Task(1838, "zeroshot/piqa_llmfoundry_format/validation.jsonl", 14, 46, 74),
    "gsm8k": Task(1319, "math/gsm8k/test.jsonl", 866, generated=120),
    "gsm8k_cot": Task(1319, "math/gsm8k/test.jsonl", 665, generated=120),
    "svamp": Task(1000, "math/svamp/test.jsonl", 43, generated=60),
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """A bench of ``mambacus solve``: problems, and the tokens of a prompt and of a worked solution with its answer."""

    problems: int
    file: str
    prompt: float
    solution: float


BENCHES = {
    "wordproblems": Bench(1000, "", 37, 24),
    "wordproblems_reworded": Bench(1000, "", 46, 24),
    "wordproblems_novel": Bench(1000, "", 38, 24),
    "gsm8k": Bench(1319, "math/gsm8k/test.jsonl", 62, 78),
    "svamp": Bench(1000, "math/svamp/test.jsonl", 43, 24),
    "asdiv": Bench(2084, "math/asdiv/test_numeric.jsonl", 42, 24),
    "mawps": Bench(238, "math/mawps/test.jsonl", 39, 24),
    "gsm_hard": Bench(1319, "math/gsm_hard/test.jsonl", 61, 150),
    "aqua": Bench(254, "math/aqua/test.jsonl", 82, 75),
    "mathqa_gen": Bench(2985, "math/mathqa/test.jsonl", 74, 73),
    "math": Bench(5000, "math/math/test.jsonl", 53, 147),
    "math500": Bench(500, "math/math/math500.jsonl", 75, 209),
}
TRAINING = {  # rows, tokens of a row with prompt and answer; the hub set: its card's bytes and rows, 3.8 bytes a token
    "wordproblems": (8000, 60, ""),
    "gsm8k": (7473, 137, "math/gsm8k/train.jsonl"),
    "aqua": (2728, 130, "math/aqua/train_flan.jsonl"),
    "math": (7498, 94, "math/math/train.jsonl"),
    "mathqa_gain_lila": (3655, 121, "math/mathqa_gain_lila/train.jsonl"),
    "tinygsm_sample": (6525, 186, "math/tinygsm_sample/train.jsonl"),
    "sft_mix": (31279, 137, "math/sft_mix/train.jsonl"),
    "microsoft/orca-math-word-problems-200k": (200035, 300, ""),
}
_CHARACTERS = 4.2  # of English and arithmetic in one GPT-NeoX token
_SMALL_VOCABULARY = 32000  # below it a tokenizer cuts English finer
_FINER, _BYTES = 1.35, 4.3  # tokens of `tiny`'s tokenizer, and bytes, for one of GPT-NeoX's


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step asks of its model, in that model's tokens.

    Attributes:
        read: tokens of prompts and documents.
        passes: forward passes that read them.
        generated: tokens generated.
        decode_steps: one-token passes that generate them.
        trained: tokens trained on.
        train_steps: optimiser steps.
        documents: documents and problems handled.
        prepared: documents that are loaded and laid out for them (a limit does not spare that).
        longest: tokens of one row held at once.
        rows: rows held at once.
        unknown: what could not be counted, empty if all was.
    """

    read: float = 0.0
    passes: float = 0.0
    generated: float = 0.0
    decode_steps: float = 0.0
    trained: float = 0.0
    train_steps: float = 0.0
    documents: float = 0.0
    prepared: float = 0.0
    longest: float = 0.0
    rows: float = 0.0
    unknown: str = ""

    @property
    def tokens(self) -> float:
        """All tokens that pass through the model."""
        return self.read + self.generated + self.trained


def token_factor(source: str, vocab_size: int) -> float:
    """Return how many tokens of a model's tokenizer stand for one of GPT-NeoX's."""
    if source in ("random:micro", "random:tiny"):
        return _BYTES
    return 1.0 if vocab_size >= _SMALL_VOCABULARY else _FINER


def work_of(step: Step, factor: float, *, ours: bool, tuned: bool) -> Work:
    """Return the work of a step.

    Args:
        step: of the plan.
        factor: from `token_factor`.
        ours: a Mamba model, whose shared contexts are read once.
        tuned: the model was fine-tuned on answers, so it ends them.
    """
    if step.verb == "evaluate":
        return _evaluation(step.config, factor, ours)
    if step.verb == "solve":
        return _solving(step.config, factor, tuned)
    if step.verb == "finetune":
        return _training(step.config, factor)
    if step.verb == "merge":
        return Work(read=2 * 8 * 64.0, passes=2)  # both models read the gate's prompts
    if step.verb == "bench generation":
        return _generation(step.config, factor)
    if step.verb == "bench":
        return _benchmark(step.config)
    return Work(unknown=f"{step.verb} is not estimated")


def count_rows(data_dir: Path | None, file: str, published: int) -> int:
    """Return the rows of a local JSONL file, or the published number where there is none."""
    path = data_dir / file if data_dir is not None and file else None
    if path is None or not path.is_file():
        return published
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _evaluation(config: Any, factor: float, ours: bool) -> Work:
    read = generated = documents = prepared = longest = decode_steps = 0.0
    unknown = [name for name in config.tasks if name not in TASKS]
    for task in (TASKS[name] for name in config.tasks if name in TASKS):
        available = count_rows(config.data_dir, task.file, task.documents)
        count = min(config.limit or available, available)
        examples = 0.0 if config.num_fewshot is None or task.generated else config.num_fewshot
        shared = task.shared * (1 + examples)
        once = ours and config.state_reuse
        read += count * (shared + task.rest if once or not task.separate else task.separate + examples * task.separate)
        generated += count * task.generated
        decode_steps += math.ceil(count / config.batch_size) * task.generated
        documents += count
        prepared += available
        longest = max(longest, min(shared + task.rest, 2048))
    return Work(
        read=read * factor,
        passes=read * factor / (config.batch_size * 32),  # a pass reads one context, or the short ends of a batch
        generated=generated * factor,
        decode_steps=decode_steps * factor,
        documents=documents,
        prepared=prepared,
        longest=longest * factor,
        rows=config.batch_size,
        unknown=f"tokens of {', '.join(unknown)}" if unknown else "",
    )


def _solving(config: Any, factor: float, tuned: bool) -> Work:
    read = generated = steps = documents = longest = passes = 0.0
    for bench in (BENCHES[name] for name in config.bench):
        available = count_rows(config.data_dir, bench.file, bench.problems)
        count = min(config.limit or available, available) * config.samples
        examples = config.num_fewshot * (bench.prompt + bench.solution)
        ends = bench.solution * factor if tuned else config.max_new_tokens  # a base model writes on
        answer = min(config.max_new_tokens, ends)
        read += count * bench.prompt * factor + examples * factor
        generated += count * answer
        steps += math.ceil(count / config.batch_size) * answer
        passes += math.ceil(count / config.batch_size)
        documents += count
        longest = max(longest, (bench.prompt + examples) * factor + answer)
    return Work(
        read=read, passes=passes, generated=generated, decode_steps=steps, documents=documents, prepared=documents,
        longest=longest, rows=config.batch_size,
    )  # fmt: skip


def _training(config: Any, factor: float) -> Work:
    rows, tokens = _training_set(config.data, config.data_dir)
    if not rows:
        return Work(unknown=f"size of {config.data}")
    batch = config.batch_size or (1 if config.method == "cs5242" else 32)
    steps = config.max_steps or math.ceil(rows / batch) * config.epochs
    tokens = min(tokens * factor, config.max_length)
    pack = config.pack_length if config.pack_length > 0 else max(2048, config.max_length)
    held = min(batch * tokens / config.grad_accum, max(pack, batch * tokens / config.grad_accum))
    return Work(
        trained=steps * batch * tokens, train_steps=steps * config.grad_accum, prepared=rows,
        longest=min(pack, held), rows=max(1.0, held / pack),
    )  # fmt: skip


def _training_set(data: str, data_dir: Path | None) -> tuple[int, float]:
    """Return rows and tokens of a row of training data; no rows where neither a file nor a published size is known."""
    name, _, count = data.partition(":")
    if name in TRAINING:
        published, tokens, file = TRAINING[name]
        return (int(count) if count.isdecimal() else count_rows(data_dir, file, published)), tokens
    path = Path(data).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return 0, 0.0
    rows = count_rows(path.parent, path.name, 0)
    return rows, path.stat().st_size / _CHARACTERS / max(rows, 1)


def _generation(config: Any, factor: float) -> Work:
    prompt = BENCHES[config.prompts].prompt * factor
    answers = config.limit * (config.repeats + 1)
    return Work(
        read=answers * prompt, passes=answers, generated=answers * config.new_tokens,
        decode_steps=answers * config.new_tokens, longest=prompt + config.new_tokens, rows=1,
    )  # fmt: skip


def _benchmark(config: Any) -> Work:
    """Return our side of a benchmark that is filled in; peers are slower, see `estimate.PEER_FACTORS`."""
    if config.what == "scan":
        return Work(unknown="bench scan is not estimated")
    passes = (config.repeats + config.warmup) * len(config.dtypes) * len(config.modes) * len(config.batches)
    lengths = config.prompts if config.what == "decode" else config.seqlens
    mean_batch = sum(config.batches) / len(config.batches)
    seen = passes * mean_batch * sum(lengths)
    trains, decodes = config.what in ("train", "lengths"), config.what in ("decode", "lengths")
    steps = passes * len(lengths) * sum(config.new_tokens) if decodes else 0.0
    if config.what == "decode":  # one-token steps alone, and whole answers
        steps, seen = 2 * steps, 2 * seen
    return Work(
        read=0.0 if config.what == "train" else seen, passes=0.0 if config.what == "train" else passes * len(lengths),
        generated=steps * mean_batch, decode_steps=steps,
        trained=seen if trains else 0.0, train_steps=passes * len(lengths) if trains else 0.0,
        longest=max(lengths), rows=max(config.batches),
    )  # fmt: skip
