"""``mambacus solve``: let a model solve math problems, grade the answers, keep every item."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file, items_path
from mambacus.runtime.records import Record, Stopwatch, write_jsonl_atomic, write_record

if TYPE_CHECKING:
    from mambacus.data.problems import MathProblem


BENCHES = (
    "wordproblems", "wordproblems_reworded", "wordproblems_novel", "gsm8k", "svamp", "asdiv", "mawps", "gsm_hard",
    "aqua",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus solve``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE; any Hugging Face causal LM", metavar="M")
    bench: tuple[str, ...] = opt(help=", ".join(BENCHES), choices=BENCHES, metavar="A,B")
    out: Path = opt(help="record to write; items go to <stem>.items.jsonl beside it", metavar="FILE.json")
    adapter: Path | None = opt(None, "folder of a PEFT adapter to attach", metavar="DIR")
    limit: int | None = opt(None, "problems of each bench; default: all, of wordproblems 1000", least=1, metavar="N")
    samples: int = opt(1, "completions of each problem; above 1 adds pass@k and maj@k", least=1, metavar="K")
    style: str = opt("cot", "cot: the model reasons first; direct: it must answer at once", choices=("cot", "direct"))
    temperature: float = opt(0.0, "of sampling; 0 is greedy", least=0)
    top_k: int = opt(0, "sample from the k likeliest tokens; 0: all", least=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this share of probability", above=0, most=1)
    max_new_tokens: int = opt(256, "longest completion in tokens", least=1)
    batch_size: int = opt(32, "prompts decoded together", least=1)
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    seed: int = opt(0, "seed of sampling", least=0, most=MOST_SEED)
    problem_seed: int = opt(0, "seed of the generated wordproblems", least=0, most=MOST_SEED)
    label: str | None = opt(None, "name of the model in reports; default: from --model and --adapter", metavar="NAME")
    implementation: str = opt("auto", "auto: ours for Mamba, else transformers", choices=("auto", "mambacus", "hf"))
    overwrite: bool = opt(False, "replace an existing record")


def run(config: Config) -> Record:
    """Solve, grade and write the record and its items.

    Raises:
        UserError: an existing output, an unknown bench or model, missing data, settings that contradict each other.
    """
    _check(config)
    claim_file(config.out, overwrite=config.overwrite)
    stopwatch = Stopwatch()
    from mambacus.evals.math import load_problems, summarise

    sets = {name: load_problems(name, config.data_dir, config.limit, config.problem_seed) for name in config.bench}
    engine = _engine(config)
    benches: dict[str, dict[str, Any]] = {}
    items: list[dict[str, Any]] = []
    for name, problems in sets.items():
        found, seconds = _solve(config, engine, name, problems)
        figures = summarise(found, config.seed)
        benches[name] = figures | {"tokens_per_second": figures["generated_tokens"] / seconds}
        items += found
    path = items_path(config.out)
    write_jsonl_atomic(path, items)
    record = stopwatch.record("solve", _label(config), config, {"benches": benches}, items_file=path.name)
    write_record(config.out, record)
    return record


def _check(config: Config) -> None:
    faults = []
    if config.samples > 1 and config.temperature == 0:
        faults.append(f"--samples {config.samples}: greedy samples are all equal; add --temperature, for example 0.7")
    repeated = sorted({name for name in config.bench if config.bench.count(name) > 1})
    if repeated:
        faults.append(f"--bench: {', '.join(repeated)} given more than once")
    if not config.bench:
        faults.append("--bench: expected at least one bench")
    check(config, *faults)


def _engine(config: Config) -> Any:
    """Return what generates: our engine for Mamba, transformers for everything else."""
    from mambacus.evals.baselines import BaselineEngine, choose_implementation, load_baseline
    from mambacus.inference import Engine
    from mambacus.models import load
    from mambacus.runtime.device import resolve_device, resolve_dtype

    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    if choose_implementation(config.model, config.implementation) == "hf":
        return BaselineEngine(*load_baseline(config.model, device, dtype, config.adapter), config.batch_size)
    model, tokenizer = load(config.model, device, dtype, config.adapter, data_dir=config.data_dir)
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    return Engine(model, tokenizer, batch_size=config.batch_size)


def _solve(
    config: Config, engine: Any, bench: str, problems: Sequence[MathProblem]
) -> tuple[list[dict[str, Any]], float]:
    """Return one item per completion, and the seconds of generation."""
    from tqdm import tqdm

    from mambacus.evals import math
    from mambacus.inference import SamplingParams

    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        n=config.samples,
        stop=list(math.STOPS),
        seed=config.seed,
    )
    prompts = [math.prompt(problem, config.style) for problem in problems]
    with tqdm(total=len(problems), desc=bench, disable=None) as progress:
        start = time.perf_counter()
        completions = engine.generate(prompts, params, progress=progress.update)
        seconds = time.perf_counter() - start
    items = []
    for problem, prompt, found in zip(problems, prompts, completions, strict=True):
        items += _items(config, bench, problem, prompt, found)
    return items, seconds


def _items(
    config: Config, bench: str, problem: MathProblem, prompt: str, completions: Sequence[Any]
) -> list[dict[str, Any]]:
    from mambacus.evals.math import grade

    items = []
    for sample, completion in enumerate(completions):
        verdict = grade(problem, completion.text, config.style)
        items.append(
            {
                "bench": bench,
                "id": problem.id,
                "group": problem.group,
                "sample": sample,
                "question": problem.question,
                "gold": problem.answer,
                "prompt": prompt,
                "completion": completion.text,
                "extracted": verdict.extracted,
                "vote": verdict.vote,
                "correct": verdict.correct,
                "reason": verdict.reason,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
            }
        )
    return items


def _label(config: Config) -> str:
    if config.label:
        return config.label
    name = Path(config.model).name
    return f"{name} + {config.adapter.name}" if config.adapter else name


def main(argv: Sequence[str]) -> None:
    """Run ``mambacus solve``."""
    config = parse(Config, argv, "mambacus solve", "Let a model solve math problems and grade its answers.")
    record = run(config)
    for name, figures in record.results["benches"].items():
        low, high = figures["wilson95"]
        rates = f"parsed {figures['parse_rate']:.1%}  cut {figures['truncation_rate']:.1%}"
        speed = f"{figures['tokens_per_second']:.0f} tokens/s"
        print(f"{name:<13} {figures['accuracy']:6.1%} [{low:.1%}, {high:.1%}]  n {figures['n']}  {rates}  {speed}")
        for rule in ("pass_at", "maj_at"):
            if rule in figures:
                print(" " * 14 + "  ".join(f"{rule.replace('_at', '')}@{k} {v:.1%}" for k, v in figures[rule].items()))
    print(f"record: {config.out}")
