"""``mambacus evaluate``: score a model on lm-evaluation-harness tasks."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.flags import weights_flag
from mambacus.runtime.outputs import claim_file, items_path
from mambacus.runtime.records import Record, Stopwatch, write_jsonl_atomic, write_record

# Metrics whose document values are log-likelihoods that count once each.
_PLAIN_LOGLIKELIHOODS = ("perplexity",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus evaluate``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE; any Hugging Face causal LM", metavar="M")
    tasks: tuple[str, ...] = opt(help="lm_eval task names, separated by commas", metavar="A,B")
    out: Path = opt(help="record to write; items go to <stem>.items.jsonl beside it", metavar="FILE.json")
    adapter: Path | None = opt(None, "folder of a PEFT adapter to attach", metavar="DIR")
    state: Path | None = opt(
        None, "begin every context, a whole question, after this state (prompt compile)", metavar="FILE.state"
    )
    num_fewshot: int | None = opt(
        None, "worked examples in the prompt; default: each task's own number", least=0, metavar="K"
    )
    limit: int | None = opt(None, "only the first so many documents of each task", least=1, metavar="N")
    batch_size: int = opt(16, "contexts read in one pass", least=1)
    max_length: int | None = opt(
        None, "longest input in tokens; default: 2048 for Mamba, the model's own for others", least=1
    )
    data_dir: Path | None = opt(None, "read documents from the JSONL files in this folder, offline", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = weights_flag()
    seed: int = opt(1234, "seed of the choice of worked examples; lm_eval's default is 1234", least=0, most=MOST_SEED)
    label: str | None = opt(None, "name of the model in reports; default: from --model and --adapter", metavar="NAME")
    implementation: str = opt("auto", "auto: ours for Mamba, else transformers", choices=("auto", "mambacus", "hf"))
    fewshot_sampler: str = opt(
        "task",
        "task: as the task says, mostly other examples for every document; first_n: the same first K for all",
        choices=("task", "first_n"),
    )
    state_reuse: bool = opt(True, "read what choices and worked examples share once and fork its state")
    state_memory: int = opt(1024, "most MiB of states of shared beginnings held at once", least=1, metavar="MIB")
    cache: Path | None = opt(
        None, "folder of answers found before: an interrupted run goes on where it was, a repeated one is quick"
    )
    bootstrap_iters: int = opt(
        200, "resamples behind the standard errors of mcc and perplexity; lm_eval: 100000", least=0
    )
    overwrite: bool = opt(False, "replace an existing record")


def run(config: Config) -> Record:
    """Evaluate and write the record and its items; of several processes launched together, the first does.

    Raises:
        UserError: an existing output, an unknown task or model, missing data, an unknown device or dtype.
    """
    check(config)
    claim_file(config.out, overwrite=config.overwrite)
    stopwatch = Stopwatch()
    from lm_eval import simple_evaluate

    from mambacus.evals.catalogue import load_tasks, same_examples
    from mambacus.evals.processes import Processes, summed
    from mambacus.models.quantised import quantisation_record
    from mambacus.ops.dispatch import which_kernels
    from mambacus.runtime.device import resolve_device, resolve_dtype

    processes = Processes(resolve_device(config.device))
    if config.limit is not None and config.limit < processes.count:
        raise UserError(f"--limit {config.limit}: expected a document for each of {processes.count} processes")
    tasks, manager = load_tasks(config.tasks, config.data_dir)
    if config.fewshot_sampler == "first_n":
        same_examples(tasks)
    model = processes.attach(_model(config, processes.device))
    answering = _timed(model, processes.device)
    found = simple_evaluate(
        model=model,
        use_cache=_cache(config, model),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        bootstrap_iters=config.bootstrap_iters,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    counts = model.state_reuse_record() if hasattr(model, "state_reuse_record") else {"enabled": False}
    all_counts = processes.gather(counts)
    if found is None or all_counts is None:  # the first process writes
        return stopwatch.record("evaluate", _label(config), config, {})
    results = {
        "tasks": _scores(found),
        "lm_eval": {key: value for key, value in found.items() if key not in ("samples", "pretty_env_info")},
        "state_reuse": summed(all_counts),
        "processes": processes.count,
        "seconds": {"answering": round(sum(answering), 3)},
        "fewshot_split": {task.config.task: _fewshot_split(task) for task in tasks if task.config.num_fewshot},
    }
    if hasattr(model, "state_reuse_record"):  # ours
        results["ran_on"] = which_kernels(processes.device, resolve_dtype(config.dtype))
    if config.weights:
        results["quantisation"] = quantisation_record(model.model)
    items = items_path(config.out)
    write_jsonl_atomic(items, _items(found["samples"]))
    record = stopwatch.record("evaluate", _label(config), config, results, items_file=items.name)
    write_record(config.out, record)
    return record


def _model(config: Config, device: Any) -> Any:
    """Return the lm_eval model: ours for Mamba, lm_eval's own ``hf`` for everything else."""
    from mambacus.evals.baselines import choose_implementation, load_baseline
    from mambacus.runtime.device import resolve_dtype

    dtype = resolve_dtype(config.dtype)
    if choose_implementation(config.model, config.implementation) == "hf":
        if config.state:
            raise UserError(f"--state {config.state}: states are Mamba's; {config.model} is run by transformers")
        if config.weights:
            raise UserError(f"--weights {config.weights}: for our Mamba models; {config.model} is run by transformers")
        from lm_eval.models.huggingface import HFLM

        from mambacus.evals.catalogue import quiet

        model, tokenizer = load_baseline(config.model, device, dtype, config.adapter)
        with quiet():  # it warns that a loaded model cannot be launched on several GPUs
            return HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size, max_length=config.max_length
            )
    from mambacus.evals.harness import MAX_LENGTH, MambacusLM
    from mambacus.models import load

    model, tokenizer = load(
        config.model, device, dtype, config.adapter, weights=config.weights, data_dir=config.data_dir
    )
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    if config.state:
        from mambacus.models.primed import PrimedModel
        from mambacus.models.state_files import read_state

        model = PrimedModel(model, read_state(config.state, model, tokenizer).state)
    return MambacusLM(
        model,
        tokenizer,
        batch_size=config.batch_size,
        max_length=config.max_length or MAX_LENGTH,
        state_reuse=config.state_reuse,
        state_bytes=config.state_memory * 2**20,
        seed=config.seed,
    )


def _warm_up(model: Any, device: Any) -> None:
    """Read a little: a process's first passes load its kernels, which is no part of the seconds of answering."""
    if hasattr(model, "warm_up"):
        model.warm_up()
        return
    import torch

    with torch.inference_mode():
        model.model(input_ids=torch.ones(2, 8, dtype=torch.int64, device=device))


def _timed(model: Any, device: Any) -> list[float]:
    """Let a model note how long it answers requests, and return the seconds of each call as they come.

    A little is read before the first: nothing where every answer comes from the cache, which asks no model.
    """
    seconds: list[float] = []

    def timed(answer: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(answer)
        def call(*arguments: Any, **options: Any) -> Any:
            if not seconds:
                _warm_up(model, device)
            watch = Stopwatch()
            found = answer(*arguments, **options)
            seconds.append(watch.seconds)
            return found

        return call

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, timed(getattr(model, name)))
    return seconds


def _cache(config: Config, model: Any) -> str | None:
    """Return the file of lm_eval's cache of answers, which adds the rank of the process to its name."""
    if config.cache is None:
        return None
    from mambacus.evals.cache import cache_file, model_fingerprint

    settings = {"implementation": type(model).__name__, "max_length": model.max_length}
    fingerprint = model_fingerprint(model.model, model.tokenizer, settings)
    return str(cache_file(config.cache, "evaluate", fingerprint))


def _scores(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``{task: {metric: {value, stderr, n, higher_is_better}}}``; filters other than the default are named."""
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for task in found["n-samples"]:
        figures = found["results"][task]
        scores[task] = {}
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{rule}")
            scores[task][_metric_name(metric, rule)] = {
                "value": value,
                "stderr": None if stderr == "N/A" else stderr,
                "n": found["n-samples"][task]["effective"],
                "higher_is_better": found["higher_is_better"][task].get(metric),
            }
    return scores


def _metric_name(metric: str, rule: str) -> str:
    return metric if rule == "none" else f"{metric},{rule}"


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one item per document: its value of every metric, under every filter."""
    items = []
    for task, rows in samples.items():
        documents: dict[int, dict[str, Any]] = {}
        for row in rows:
            metrics = documents.setdefault(row["doc_id"], {})
            for metric in row["metrics"]:
                value = row[metric]
                metrics[_metric_name(metric, row["filter"])] = [value, 1] if metric in _PLAIN_LOGLIKELIHOODS else value
        items += [{"task": task, "doc_id": doc_id, "metrics": documents[doc_id]} for doc_id in sorted(documents)]
    return items


def _fewshot_split(task: Any) -> str | None:
    """Return the split that a task's worked examples come from, by lm_eval's rule."""
    config = task.config
    return config.fewshot_split or config.training_split or config.validation_split or config.test_split


def _label(config: Config) -> str:
    if config.label:
        return config.label
    name = Path(config.model).name
    return f"{name} + {config.adapter.name}" if config.adapter else name


def main(argv: Sequence[str]) -> None:
    """Run ``mambacus evaluate``."""
    config = parse(Config, argv, "mambacus evaluate", "Score a model on lm-evaluation-harness tasks.")
    if config.data_dir is not None and (config.model == "tiny" or ":" in config.model or Path(config.model).is_dir()):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # nothing is to be fetched: let nothing try
            os.environ.setdefault(name, "1")
    record = run(config)
    if not record.results:
        return
    for task, metrics in record.results["tasks"].items():
        for metric, score in metrics.items():
            stderr = "" if score["stderr"] is None else f" ± {float(score['stderr']):.4f}"
            value = float(score["value"])  # a record spells infinity, which a broken model has, as text
            print(f"{task:<18} {metric:<30} {value:>10.4f}{stderr:<10}  n {score['n']}")
    reuse = record.results["state_reuse"]
    if reuse["enabled"]:
        print(f"tokens read: {reuse['tokens_read']}, saved by state reuse: {reuse['tokens_saved']}")
    print(f"record: {config.out}")
