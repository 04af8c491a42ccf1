"""A small study made of synthetic records whose statistics are known: a base, its tuned twin and one baseline."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from mambacus.runtime.records import Record, write_json_atomic, write_jsonl_atomic, write_record
from mambacus.runtime.stats import matthews, wilson

ENVIRONMENT = {
    "mambacus": "0.1.0",
    "python": "3.11.2",
    "system": "Linux x86_64",
    "cpu": "Example CPU (avx2)",
    "cores": 2,
    "torch_threads": 2,
    "gpu": None,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
}
METRICS = {
    "acc": True,
    "acc_norm": True,
    "exact_match,strict-match": True,
    "mcc": True,
    "perplexity": False,
    "word_perplexity": False,
    "byte_perplexity": False,
}


def record(
    kind: str, label: str, config: dict[str, Any], results: dict[str, Any], items_file: str | None = None
) -> Record:
    """Return a record with a fixed environment."""
    return Record(
        kind=kind,
        label=label,
        config=config,
        results=results,
        environment=ENVIRONMENT,
        command=["mambacus", kind, "--model", str(config.get("model", "tiny"))],
        started_at="2026-01-02T03:04:05+00:00",
        seconds=12.5,
        items_file=items_file,
    )


def write_evaluate(path: Path, label: str, items: dict[str, dict[str, list[Any]]], **config: Any) -> Path:
    """Write an evaluate record whose metrics are computed from ``items``: task -> metric -> value of every item."""
    tasks: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for task, metrics in items.items():
        tasks[task] = {}
        for metric, values in metrics.items():
            if metric.endswith("perplexity"):
                value = math.exp(-sum(ll for ll, _ in values) / sum(weight for _, weight in values))
            elif metric == "mcc":
                value = _matthews(values)
            else:
                value = sum(values) / len(values)
            tasks[task][metric] = {
                "value": value,
                "stderr": None,
                "n": len(values),
                "higher_is_better": METRICS[metric],
            }
        for doc in range(len(next(iter(metrics.values())))):
            rows.append(
                {"task": task, "doc_id": doc, "metrics": {metric: values[doc] for metric, values in metrics.items()}}
            )
    write_jsonl_atomic(path.with_suffix(".items.jsonl"), rows)
    settings = {"model": label, "adapter": None, "limit": None} | config
    made = record("evaluate", label, settings, {"tasks": tasks, "lm_eval": {}}, path.with_suffix(".items.jsonl").name)
    write_record(path, made)
    return path


def write_solve(
    path: Path,
    label: str,
    benches: dict[str, list[bool]],
    *,
    groups: list[str] | None = None,
    samples: int = 1,
    first_number: int = 0,
    **config: Any,
) -> Path:
    """Write a solve record from bench -> whether each completion was right.

    Args:
        path: the record.
        label: the model.
        benches: outcomes; with several ``samples`` those of a problem follow each other.
        groups: group names that the problems take in turn.
        samples: completions of each problem.
        first_number: number in the first question.
        config: settings of the record.
    """
    results, rows = {}, []
    for bench, right in benches.items():
        results[bench] = {
            "n": len(right) // samples,
            "correct": sum(right),
            "accuracy": sum(right) / len(right),
            "wilson95": list(wilson(sum(right) // samples, len(right) // samples)),
            "parse_rate": 0.98,
            "truncation_rate": 0.01,
            "eos_rate": 0.97,
            "generated_tokens": 40 * len(right),
            "tokens_per_second": 1834.2,
        }
        for place, correct in enumerate(right):
            number = place // samples
            rows.append(
                _solved(bench, number, first_number + number, correct)
                | {"sample": place % samples, "group": groups[number % len(groups)] if groups else ""}
            )
    write_jsonl_atomic(path.with_suffix(".items.jsonl"), rows)
    settings = {"model": label, "adapter": None, "limit": None} | config
    write_record(path, record("solve", label, settings, {"benches": results}, path.with_suffix(".items.jsonl").name))
    return path


def _solved(bench: str, place: int, apples: int, correct: bool) -> dict[str, Any]:
    answer = apples + 3 + (not correct)
    return {
        "bench": bench,
        "id": f"{bench}-{place}",
        "question": f"Mia has {apples} apples and buys 3 more. How many has she now?",
        "gold": str(apples + 3),
        "prompt": "",
        "completion": f" {apples} + 3 = {answer}\nShe has {answer} apples.\n#### {answer}",
        "extracted": str(answer),
        "correct": correct,
        "reason": "####",
        "finish_reason": "eos",
        "tokens": 21,
    }


def coin(n: int, share: float, seed: int) -> list[bool]:
    """Return ``n`` outcomes of which about ``share`` are true."""
    source = random.Random(seed)
    return [source.random() < share for _ in range(n)]


def flip(values: list[bool], gained: int, lost: int) -> list[bool]:
    """Return ``values`` with exactly ``gained`` false ones made true and ``lost`` true ones made false."""
    result = list(values)
    wrong = [place for place, value in enumerate(values) if not value][:gained]
    right = [place for place, value in enumerate(values) if value][:lost]
    assert len(wrong) == gained and len(right) == lost
    for place in wrong:
        result[place] = True
    for place in right:
        result[place] = False
    return result


def texts(n: int, nats_per_word: float, seed: int, shift: float = 0.0) -> list[list[float]]:
    """Return ``[loglikelihood, words]`` of ``n`` passages, perplexity per word about exp(nats_per_word + shift)."""
    source = random.Random(seed)
    rows = []
    for _ in range(n):
        words = source.randint(150, 220)
        noise = source.gauss(0, 0.1)
        rows.append([-words * (nats_per_word + noise + shift), float(words)])
    return rows


def _matthews(pairs: list[list[int]]) -> float:
    return matthews(np.asarray(pairs, dtype=float))


def write_study(folder: Path) -> Path:
    """Write a whole synthetic study (base, tuned twin, one baseline, training, bench) and return its folder."""
    base_math, base_arc, base_hella = coin(600, 0.03, 1), coin(1000, 0.27, 2), coin(1500, 0.31, 3)
    base_wino, base_cola = (
        coin(800, 0.51, 4),
        [[int(a), int(b)] for a, b in zip(coin(500, 0.7, 5), coin(500, 0.6, 6), strict=True)],
    )
    for label, models in {
        "tiny": (base_math, base_arc, base_hella, base_wino, texts(60, 4.0, 7), base_cola),
        "tiny+lora": (
            flip(base_math, 430, 2),
            flip(base_arc, 25, 31),
            flip(base_hella, 20, 75),
            flip(base_wino, 30, 28),
            [[ll - 5.0 - place % 7, w] for place, (ll, w) in enumerate(texts(60, 4.0, 7))],
            base_cola,
        ),
        "pythia-tiny": (
            coin(600, 0.02, 11),
            coin(1000, 0.25, 12),
            coin(1500, 0.26, 13),
            coin(800, 0.5, 14),
            texts(60, 4.4, 7),
            [[a, 1] for a, _ in base_cola],
        ),
    }.items():
        problems, arc, hella, wino, words, cola = models
        write_solve(folder / "solve" / f"{label}.json", label, {"wordproblems": problems})
        write_evaluate(
            folder / "evaluate" / f"{label}.json",
            label,
            {
                "text_sample": {"word_perplexity": words, "byte_perplexity": [[ll, 6 * w] for ll, w in words]},
                "arc_easy": {"acc": [float(x) for x in arc]},
                "hellaswag": {"acc_norm": [float(x) for x in hella]},
                "winogrande": {"acc": [float(x) for x in wino]},
                "cola": {"mcc": cola},
            },
        )
    write_solve(folder / "solve" / "attached.json", "tiny+lora (attached)", {"wordproblems": flip(base_math, 430, 2)})
    write_training(folder)
    write_bench(folder / "bench" / "decode.json")
    models_ = [
        {"label": "tiny", "role": "subject"},
        {"label": "tiny+lora", "role": "tuned", "base": "tiny"},
        {"label": "tiny+lora (attached)", "role": "check", "base": "tiny+lora"},
        {"label": "pythia-tiny", "role": "baseline"},
    ]
    steps = [
        {
            "id": "solve tiny",
            "stage": "baseline",
            "record": "solve/tiny.json",
            "command": "mambacus solve --model tiny --bench wordproblems",
        }
    ]
    write_record(
        folder / "study.json",
        record(
            "study",
            "synthetic",
            {},
            {
                "title": "Synthetic study",
                "description": "Records with known statistics.",
                "models": models_,
                "steps": steps,
                "substitutions": [],
            },
        ),
    )
    return folder


def write_training(folder: Path) -> None:
    """Write a finetune and a merge record."""
    source = random.Random(9)
    history = [
        {
            "step": step,
            "loss": 0.35 + 2.4 * math.exp(-step / 90) + source.gauss(0, 0.03),
            "learning_rate": 1e-3 * (1 - step / 600),
        }
        for step in range(1, 601)
    ]
    results = {
        "train": {
            "steps": 600,
            "tokens": 1_200_000,
            "seconds": 143.2,
            "tokens_per_second": 8380.0,
            "loss_first": history[0]["loss"],
            "loss_last": history[-1]["loss"],
            "peak_memory_bytes": 1_500_000_000,
        },
        "parameters": {"trainable": 213_000, "total": 4_610_000, "targets": ["in_proj", "out_proj"]},
        "data": {
            "rows": 4000,
            "kept": 3996,
            "dropped": {"duplicate": 4, "too long": 0},
            "truncated": 0,
            "packing_efficiency": 0.972,
        },
        "history": history,
    }
    config = {
        "model": "tiny",
        "out": str(folder / "finetune" / "tiny+lora"),
        "method": "lora",
        "data": "wordproblems:4000",
    }
    write_record(folder / "finetune" / "tiny+lora" / "record.json", record("finetune", "tiny+lora", config, results))
    gate = {"gate": {"prompts": 12, "max_logit_difference": 3.1e-6, "tolerance": 1e-4}, "untied": False}
    config = {"adapter": str(folder / "finetune" / "tiny+lora" / "adapter"), "out": str(folder / "merge" / "tiny+lora")}
    write_record(folder / "merge" / "tiny+lora" / "record.json", record("merge", "tiny+lora", config, gate))
    write_json_atomic(folder / "merge" / "tiny+lora" / "config.json", {"model_type": "mamba"})


def write_bench(path: Path) -> None:
    """Write a bench record with two implementations and one case that ran out of memory."""
    rows = [
        {
            "benchmark": name,
            "implementation": who,
            "model": "130m",
            "dtype": dtype,
            "batch": 1,
            "seqlen": 1024,
            "new_tokens": new,
            "median_ms": ms,
            "samples_ms": [ms * 0.98, ms, ms * 1.03],
            "tokens_per_second": 1000 * (new or 1024) / ms,
            "peak_memory_bytes": 1_400_000_000,
            "device": "cpu",
        }
        for name, new, dtype, times in (
            ("prefill", 0, "float32", (2300.0, 10100.0)),
            ("decode", 32, "float32", (1000.0, 2336.0)),
            ("decode", 32, "bfloat16", (760.0, 3900.0)),
        )
        for who, ms in zip(("mambacus", "transformers"), times, strict=True)
    ]
    rows.append(
        {
            "benchmark": "train",
            "implementation": "transformers",
            "model": "130m",
            "dtype": "float32",
            "batch": 2,
            "seqlen": 256,
            "new_tokens": 0,
            "error": "out of memory",
        }
    )
    write_record(path, record("bench", "130m", {}, {"rows": rows}))
