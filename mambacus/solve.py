"""``mambacus solve``: let a model solve math problems, grade the answers, keep every item."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.flags import weights_flag
from mambacus.runtime.outputs import claim_file, items_path
from mambacus.runtime.records import Record, Stopwatch, write_jsonl_atomic, write_record

if TYPE_CHECKING:
    from mambacus.data.problems import MathProblem
    from mambacus.prompts import Prompt


BENCHES = (
    "wordproblems", "wordproblems_reworded", "wordproblems_novel", "gsm8k", "svamp", "asdiv", "mawps", "gsm_hard",
    "aqua", "mathqa_gen", "math", "math500",
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
    style: str = opt(
        "cot",
        "cot: the model reasons first; direct: it must answer at once; program: it writes Python, which a sandbox runs",
        choices=("cot", "direct", "program"),
    )
    num_fewshot: int = opt(0, "worked examples before each problem, from the training set", least=0, metavar="K")
    prompt: Path | None = opt(
        None, "prompt file to ask with (prompt optimise), read for every problem", metavar="FILE.yaml"
    )
    state: Path | None = opt(
        None, "compiled prompt to ask with (prompt compile): of it only the question is read", metavar="FILE.state"
    )
    program_seconds: int = opt(5, "CPU seconds that a program of the model may take", least=1)
    temperature: float = opt(0.0, "of sampling; 0 is greedy", least=0)
    top_k: int = opt(0, "sample from the k likeliest tokens; 0: all", least=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this share of probability", above=0, most=1)
    max_new_tokens: int = opt(256, "longest completion in tokens", least=1)
    batch_size: int = opt(32, "prompts decoded together", least=1)
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = weights_flag()
    seed: int = opt(0, "seed of sampling", least=0, most=MOST_SEED)
    problem_seed: int = opt(0, "seed of the generated wordproblems", least=0, most=MOST_SEED)
    label: str | None = opt(None, "name of the model in reports; default: from --model and --adapter", metavar="NAME")
    implementation: str = opt("auto", "auto: ours for Mamba, else transformers", choices=("auto", "mambacus", "hf"))
    cache: Path | None = opt(
        None, "folder of completions found before: an interrupted run goes on where it was", metavar="DIR"
    )
    overwrite: bool = opt(False, "replace an existing record")


def run(config: Config) -> Record:
    """Solve, grade and write the record and its items.

    Raises:
        UserError: an existing output, an unknown bench or model, missing data, settings that contradict each other.
    """
    _check(config)
    claim_file(config.out, overwrite=config.overwrite)
    stopwatch = Stopwatch()
    from mambacus.evals.math import examples, load_problems, prompt, summarise
    from mambacus.models.quantised import quantisation_record
    from mambacus.ops.dispatch import which_kernels
    from mambacus.prompts.prompt import question_of
    from mambacus.runtime.device import resolve_device

    if config.style == "program":
        from mambacus.evals.sandbox import check_available

        check_available()
    sets = {name: load_problems(name, config.data_dir, config.limit, config.problem_seed) for name in config.bench}
    shots = {name: examples(name, config.style, config.data_dir, config.num_fewshot) for name in config.bench}
    engine = _engine(config)
    engine, asked = _asked(config, engine, sets)
    cache = _cache(config, engine)
    benches: dict[str, dict[str, Any]] = {}
    items: list[dict[str, Any]] = []
    for name, problems in sets.items():
        prompts = [prompt(problem, config.style) for problem in problems]
        if asked is not None:
            shots[name], begun = (asked.lead, asked.preamble) if config.state else (asked.prefix, "")
            shared = len(begun + shots[name])  # read once for all problems, by the state or here
            prompts = [asked.text(question_of(problem))[shared:] for problem in problems]
        completions, speed = _complete(config, engine, cache, name, prompts, shots[name], asked)
        found = _items(config, name, problems, [shots[name] + text for text in prompts], completions)
        benches[name] = summarise(found, config.seed) | speed
        items += found
    cache.close()
    path = items_path(config.out)
    write_jsonl_atomic(path, items)
    results: dict[str, Any] = {"benches": benches}
    results["prompt_tokens"] = getattr(getattr(engine, "stats", None), "prompt_tokens", None)
    if config.state is not None:  # against reading its text for every problem; --prompt too reads that once a run
        results["prompt_tokens_saved"] = int(engine.model.tokens) * sum(map(len, sets.values()))
    if hasattr(engine, "stats"):  # ours
        results["ran_on"] = which_kernels(resolve_device(config.device))
    if config.weights:
        results["quantisation"] = quantisation_record(engine.model)
    record = stopwatch.record("solve", _label(config), config, results, items_file=path.name)
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
    given = [flag for flag, path in (("--prompt", config.prompt), ("--state", config.state)) if path is not None]
    if len(given) == 2:
        faults.append("--prompt and --state exclude each other: a state holds its prompt")
    if given and (config.style != "cot" or config.num_fewshot):
        faults.append(f"{given[0]}: has its own frame and examples; expected --style cot and no --num-fewshot")
    check(config, *faults)


def _engine(config: Config) -> Any:
    """Return what generates: our engine for Mamba, transformers for everything else."""
    from mambacus.evals.baselines import BaselineEngine, choose_implementation, load_baseline
    from mambacus.inference import Engine
    from mambacus.models import load
    from mambacus.runtime.device import resolve_device, resolve_dtype

    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    if choose_implementation(config.model, config.implementation) == "hf":
        if config.weights:
            raise UserError(f"--weights {config.weights}: for our Mamba models; {config.model} is run by transformers")
        return BaselineEngine(*load_baseline(config.model, device, dtype, config.adapter), config.batch_size)
    model, tokenizer = load(
        config.model, device, dtype, config.adapter, weights=config.weights, data_dir=config.data_dir
    )
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    return Engine(model, tokenizer, batch_size=config.batch_size)


def _asked(config: Config, engine: Any, sets: Mapping[str, Sequence[MathProblem]]) -> tuple[Any, Prompt | None]:
    """Return the engine, which with ``--state`` begins from the state, and the prompt to ask with if one is given."""
    from mambacus.inference import Engine
    from mambacus.prompts import read_prompt
    from mambacus.prompts.asking import prime
    from mambacus.prompts.prompt import question_of

    if config.prompt is not None:
        return engine, read_prompt(config.prompt)
    if config.state is None:
        return engine, None
    if not isinstance(engine, Engine):
        raise UserError(f"--state {config.state}: states are Mamba's; {config.model} is run by transformers")
    questions = [question_of(problem) for problems in sets.values() for problem in problems]
    model, prompt = prime(config.state, engine.model, engine.tokenizer, questions)
    return Engine(model, engine.tokenizer, batch_size=engine.batch_size), prompt


def _cache(config: Config, engine: Any) -> Any:
    """Return the cache of completions; without ``--cache`` one that keeps nothing between runs."""
    from mambacus.evals.cache import CompletionCache, cache_file, model_fingerprint

    if config.cache is None:
        return CompletionCache(None)
    model = model_fingerprint(engine.model, engine.tokenizer, {"engine": type(engine).__name__})
    return CompletionCache(cache_file(config.cache, "solve", model).with_suffix(".db"))


def _complete(
    config: Config, engine: Any, cache: Any, bench: str, prompts: Sequence[str], shots: str, asked: Prompt | None
) -> tuple[list[list[Any]], dict[str, Any]]:
    """Return the completions of each prompt, and how fast they came."""
    from tqdm import tqdm

    from mambacus.evals import generation, math
    from mambacus.inference import SamplingParams

    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        n=config.samples,
        stop=list(asked.stops if asked is not None else math.stops(config.style)),
        seed=config.seed,
    )
    hits = cache.hits
    with tqdm(total=len(prompts), desc=bench, disable=None) as progress:
        start = time.perf_counter()
        completions = generation.solve(engine, prompts, shots, params, cache, progress.update)
        seconds = time.perf_counter() - start
    tokens = sum(len(each.token_ids) for found in completions for each in found)
    hits = cache.hits - hits
    if hits:  # part of the work was done before: no speed can be told
        return completions, {"tokens_per_second": None, "from_cache": hits}
    return completions, {"tokens_per_second": tokens / seconds}


def _items(
    config: Config, bench: str, problems: Sequence[MathProblem], prompts: Sequence[str], completions: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return one item per completion, graded."""
    from mambacus.evals.sandbox import Limits, program_in, run_programs

    asked = [
        (problem, prompt, sample, completion)
        for problem, prompt, found in zip(problems, prompts, completions, strict=True)
        for sample, completion in enumerate(found)
    ]
    outcomes: list[Any] = [None] * len(asked)
    if config.style == "program":
        limits = Limits(seconds=config.program_seconds, wall_seconds=3.0 * config.program_seconds)
        outcomes = run_programs([program_in(completion.text) for _, _, _, completion in asked], limits)
    return [_item(config, bench, *each, outcome) for each, outcome in zip(asked, outcomes, strict=True)]


def _item(
    config: Config, bench: str, problem: MathProblem, prompt: str, sample: int, completion: Any, outcome: Any
) -> dict[str, Any]:
    """Return the record of one completion."""
    from mambacus.evals import math, mistakes
    from mambacus.evals.answers import first_answer

    verdict = math.grade(problem, completion.text, config.style, latex=math.BENCHES[bench].latex, outcome=outcome)
    item = {
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
    if isinstance(problem, math.PartedProblem):
        item["parts"] = dict(problem.parts)
    if outcome is None:
        found = mistakes.equations(first_answer(completion.text))
        item["equations"] = [sum(equation.right for equation in found), len(found)]
        parsed = verdict.extracted is not None
        wrong = mistakes.error_category(first_answer(completion.text), parsed, completion.finish_reason)
    else:
        wrong = verdict.reason.partition(" (")[0] if outcome.answer is None else mistakes.SET_UP
    item["error"] = None if verdict.correct else wrong
    return item


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
        rate = figures["tokens_per_second"]
        speed = f"{rate:.0f} tokens/s" if rate else f"{figures.get('from_cache', 0)} from the cache"
        print(f"{name:<13} {figures['accuracy']:6.1%} [{low:.1%}, {high:.1%}]  n {figures['n']}  {rates}  {speed}")
        for rule in ("pass_at", "maj_at"):
            if rule in figures:
                print(" " * 14 + "  ".join(f"{rule.replace('_at', '')}@{k} {v:.1%}" for k, v in figures[rule].items()))
        if "errors" in figures:
            print(" " * 14 + "wrong: " + ", ".join(f"{kind} {count}" for kind, count in figures["errors"].items()))
    if "prompt_tokens_saved" in record.results:
        read, saved = record.results["prompt_tokens"], record.results["prompt_tokens_saved"]
        print(f"prompt tokens read: {read:,}; the text of the state, read for every problem, would add {saved:,}")
    print(f"record: {config.out}")
