"""Are the numbers those of lm_eval's ``hf`` model? Every request, every metric, every greedy text, on one checkpoint.

Both models answer the same tasks over local files, at several batch sizes, without a cache. The checkpoint is exported
by us and read by transformers; ``--layers`` keeps the first layers only, as transformers reads Mamba token by token on
a CPU. Prints a row a task, writes one JSON record and ends with status 1 where a bar is missed.

    python benchmarks/evaluation_parity.py --data-dir DATA --out parity.json
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Stopwatch, write_record

TASKS = (
    "wikitext", "lambada_openai", "lambada_standard", "arc_easy", "arc_challenge", "hellaswag", "cola", "openbookqa",
    "mathqa", "winogrande", "piqa",
)  # fmt: skip
GENERATION = ("gsm8k",)
NATS = 1e-4  # a request's log-likelihood may differ by so much
ROLLING = 1e-6  # of a document's sum: hf adds float32 numbers up in float32
METRIC = 1e-5  # of a perplexity, which is a mean of log-likelihoods; all other metrics must be equal


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the comparison."""

    data_dir: Path = opt(help="folder of the evaluation files", metavar="DIR")
    out: Path = opt(help="record to write", metavar="FILE.json")
    model: str = opt("tiny", help="tiny or a model folder")
    layers: int = opt(2, "of the model, its first ones (0: all)", least=0)
    tasks: tuple[str, ...] = opt(TASKS, "tasks scored by log-likelihood", metavar="A,B")
    generation: tuple[str, ...] = opt(GENERATION, "tasks answered in words", metavar="A,B")
    limit: int = opt(200, "documents of each task", least=1)
    generation_limit: int = opt(50, "documents of each generation task", least=1)
    batch_sizes: tuple[int, ...] = opt((1, 16), "of both models", least=1)
    overwrite: bool = opt(False, "replace an existing record")


def export(config: Config, folder: Path) -> None:
    """Write the checkpoint that both read."""
    from mambacus.models import load, save
    from mambacus.models.registry import random_model

    model, tokenizer = load(config.model)
    if config.layers:
        short = random_model(dataclasses.replace(model.config, n_layer=config.layers))
        weights = model.state_dict()
        short.load_state_dict({name: weights[name] for name in short.state_dict()})
        model = short
    save(model, folder, tokenizer)


def models(folder: Path, batch_size: int) -> Iterator[tuple[str, Any]]:
    """Yield lm_eval's ``hf`` model and ours."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from mambacus.evals.baselines import load_baseline
    from mambacus.evals.harness import MAX_LENGTH, MambacusLM
    from mambacus.models import load

    peer, tokenizer = load_baseline(str(folder), torch.device("cpu"), torch.float32, None)
    yield "hf", HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=batch_size, max_length=MAX_LENGTH)
    yield "mambacus", MambacusLM(*load(folder), batch_size=batch_size)


def evaluated(model: Any, tasks: Sequence[str], config: Config, limit: int, batch_size: int) -> dict[str, Any]:
    """Return what lm_eval finds, samples included."""
    from lm_eval import simple_evaluate

    from mambacus.evals.catalogue import load_tasks

    loaded, manager = load_tasks(tasks, config.data_dir)
    return dict(
        simple_evaluate(
            model, tasks=loaded, task_manager=manager, limit=limit, batch_size=batch_size, bootstrap_iters=0
        )
    )


def compare(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return how far two evaluations of one task are apart.

    ``worst_nats``: of single requests; ``worst_rolling``: of documents, as a part of their sum; ``texts_differ``,
    ``greedy_differ`` and ``metrics_differ``: how many, which should be 0; ``held``: whether all bars are.
    """
    answers = [_answers(found["samples"][task]) for found in (ours, theirs)]
    assert len(answers[0]) == len(answers[1]) > 0, task
    row: dict[str, Any] = {"task": task, "documents": ours["n-samples"][task]["effective"], "requests": len(answers[0])}
    row |= {"worst_nats": 0.0, "worst_rolling": 0.0, "greedy_differ": 0, "texts_differ": 0}
    for one, other in zip(*answers, strict=True):
        if isinstance(one, str):
            row["texts_differ"] += one != other
        elif isinstance(one, tuple):
            row["worst_nats"] = max(row["worst_nats"], abs(one[0] - other[0]))
            row["greedy_differ"] += one[1] != other[1]
        else:
            row["worst_rolling"] = max(row["worst_rolling"], abs(one - other) / abs(other))
    metrics = [_metrics(found["results"][task]) for found in (ours, theirs)]
    smooth = ("perplexity", "bits_per_byte")
    row["metrics"] = {name: [value, metrics[1][name]] for name, value in metrics[0].items()}
    row["metrics_differ"] = sum(
        not math.isclose(*pair, rel_tol=METRIC if any(part in name for part in smooth) else 0.0)
        for name, pair in row["metrics"].items()
    )
    row["held"] = (
        row["worst_nats"] <= NATS
        and row["worst_rolling"] <= ROLLING
        and not any(row[name] for name in ("greedy_differ", "texts_differ", "metrics_differ"))
    )
    return row


def _metrics(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float) and "stderr" not in name}


def _answers(samples: Sequence[dict[str, Any]]) -> list[Any]:
    """Return a task's answers in order: a text, (log-likelihood, is greedy), or a document's sum."""
    unique = {sample["doc_id"]: sample for sample in samples}  # a filter repeats the documents
    found = [answer for key in sorted(unique) for answers in unique[key]["resps"] for answer in answers]
    return [tuple(answer) if isinstance(answer, (list, tuple)) else answer for answer in found]


def measure(config: Config) -> dict[str, Any]:
    """Return the rows of all tasks and batch sizes, and the seconds that each model took."""
    rows, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export(config, folder)
        for batch_size in config.batch_sizes:
            for tasks, limit in ((config.tasks, config.limit), (config.generation, config.generation_limit)):
                if not tasks:
                    continue
                found = {}
                for kind, model in models(folder, batch_size):
                    watch = Stopwatch()
                    found[kind] = evaluated(model, tasks, config, limit, batch_size)
                    seconds.append({"model": kind, "batch_size": batch_size, "tasks": list(tasks),
                                    "seconds": round(watch.seconds, 1)})  # fmt: skip
                rows += [{"batch_size": batch_size} | compare(task, found["mambacus"], found["hf"]) for task in tasks]
    return {
        "rows": rows, "seconds": seconds, "held": all(row["held"] for row in rows),
        "bars": {"nats": NATS, "rolling": ROLLING, "likelihood_metrics": METRIC},
    }  # fmt: skip


def main() -> int:
    """Compare, print and write the record."""
    config = parse(Config, sys.argv[1:], "evaluation_parity", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    results = measure(config)
    name = f"{config.model}, first {config.layers} layers" if config.layers else config.model
    write_record(config.out, watch.record("evaluation-parity", name, config, results))
    for row in results["rows"]:
        worst = f"{row['worst_nats']:.1e} nats, {row['worst_rolling']:.1e} of a sum"
        differ = row["greedy_differ"] + row["texts_differ"] + row["metrics_differ"]
        print(f"{row['task']:<18} batch {row['batch_size']:<3} {row['requests']:>6} requests  {worst}  "
              f"{differ} differ  {'held' if row['held'] else 'MISSED'}")  # fmt: skip
    return 0 if results["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
