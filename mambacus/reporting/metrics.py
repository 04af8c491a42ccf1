"""What is known about each task: its name on the page, which metric speaks for it, and where guessing would land."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Task:
    """How one task is shown.

    Attributes:
        title: its name on the page.
        family: ``math``, ``knowledge`` or ``language``; gain and cost are told apart by it.
        main: the metrics that speak for the task in comparisons and on the radar, most usual first; more than one only
            where they say different things.
        chance: what guessing scores on the main metric (share of items right).
    """

    title: str
    family: str
    main: tuple[str, ...]
    chance: float = 0.0


TASKS = {
    "wordproblems": Task("Word problems", "math", ("accuracy",)),
    "wordproblems_reworded": Task("Word problems, reworded", "math", ("accuracy",)),
    "wordproblems_novel": Task("Word problems, new situations", "math", ("accuracy",)),
    "gsm8k": Task("GSM8K", "math", ("accuracy", "exact_match,strict-match", "exact_match,flexible-extract")),
    "svamp": Task("SVAMP", "math", ("accuracy",)),
    "asdiv": Task("ASDiv", "math", ("accuracy",)),
    "mawps": Task("MAWPS", "math", ("accuracy",)),
    "gsm_hard": Task("GSM-Hard", "math", ("accuracy",)),
    "math": Task("MATH", "math", ("accuracy",)),
    "aqua": Task("AQuA", "math", ("accuracy",), chance=0.2),
    "mathqa": Task("MathQA", "math", ("acc",), chance=0.2),
    "arc_easy": Task("ARC easy", "knowledge", ("acc",), chance=0.25),
    "arc_challenge": Task("ARC challenge", "knowledge", ("acc_norm",), chance=0.25),
    "hellaswag": Task("HellaSwag", "knowledge", ("acc_norm",), chance=0.25),
    "openbookqa": Task("OpenBookQA", "knowledge", ("acc_norm",), chance=0.25),
    "winogrande": Task("WinoGrande", "knowledge", ("acc",), chance=0.5),
    "piqa": Task("PIQA", "knowledge", ("acc",), chance=0.5),
    "cola": Task("CoLA", "language", ("mcc",)),
    "lambada_openai": Task("LAMBADA openai", "language", ("acc", "perplexity")),
    "lambada_standard": Task("LAMBADA", "language", ("acc", "perplexity")),
    "wikitext": Task("WikiText", "language", ("word_perplexity",)),
    "text_sample": Task("English novels", "language", ("word_perplexity",)),
}

_METRIC_TITLES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "exact_match,strict-match": "exact match, strict",
    "exact_match,flexible-extract": "exact match, flexible",
    "mcc": "Matthews correlation",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
}
_SHORT = {
    "accuracy": "solved",
    "exact_match,strict-match": "strict",
    "exact_match,flexible-extract": "flexible",
    "acc": "accuracy",
    "perplexity": "perplexity",
}
_FAMILY_TITLES = {"math": "Mathematics", "knowledge": "Knowledge and reasoning", "language": "Language"}
FAMILIES = tuple(_FAMILY_TITLES)


def plain_metric(name: str) -> str:
    """Return lm_eval's metric key without its empty filter: ``acc,none`` -> ``acc``."""
    return name.removesuffix(",none")


def task_info(name: str) -> Task:
    """Return what is known of a task; an unknown one keeps its name and starts its axis at zero."""
    known = TASKS.get(name) or TASKS.get(name.partition(":")[0])
    if known is None:
        return Task(name, "knowledge", ())
    part = name.partition(":")[2]
    return dataclasses.replace(known, title=f"{known.title}, {part}") if part else known


def main_metrics(task: str, present: Iterable[str]) -> list[str]:
    """Return which of the metrics ``present`` speak for ``task``; for an unknown task, the first one."""
    names = list(present)
    chosen = [metric for metric in task_info(task).main if metric in names]
    return chosen or names[:1]


def task_title(task: str, metric: str) -> str:
    """Return the name of a task on an axis; the metric is part of it where several speak for the task."""
    info = task_info(task)
    return f"{info.title}, {_SHORT[metric]}" if len(info.main) > 1 and metric in _SHORT else info.title


def metric_title(metric: str) -> str:
    """Return a metric's name in words."""
    return _METRIC_TITLES.get(metric, metric.replace("_", " ").replace(",", ", "))


def family_title(family: str) -> str:
    """Return a family's name in words."""
    return _FAMILY_TITLES[family]


def metric_kind(metric: str) -> str:
    """Return ``perplexity`` (positive, lower is better), ``share`` (of items right), ``correlation`` or ``other``."""
    base = metric.partition(",")[0]
    if base.endswith("perplexity"):
        return "perplexity"
    if base in ("acc", "acc_norm", "accuracy", "exact_match", "acc_mutual_info"):
        return "share"
    return "correlation" if base == "mcc" else "other"


def chance_level(task: str, metric: str) -> float:
    """Return what guessing scores: the task's chance for shares, 0 otherwise."""
    return task_info(task).chance if metric_kind(metric) == "share" else 0.0
