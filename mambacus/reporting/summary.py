"""The head of the page: one sentence per fine-tuning, key figures, and what a reader must know before believing them.

Which comparison speaks for the gain and which for the cost is fixed by rule, not by how large it came out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mambacus.reporting.compare import Comparison
from mambacus.reporting.formats import duration, percent, rate, show
from mambacus.reporting.metrics import task_info, task_title
from mambacus.reporting.panels import change_text
from mambacus.reporting.samples import identical
from mambacus.reporting.sources import Source, of_kind

MOST_CARDS = 2  # pairs that get cards; more would bury the page

Pair = tuple[str, str, Sequence[Comparison]]  # (base, tuned, comparisons)


@dataclasses.dataclass(frozen=True)
class Card:
    """A key figure: what, the figure, one line under it, and ``better``, ``worse``, ``open`` or nothing."""

    title: str
    figure: str
    note: str
    style: str = ""


def gain(rows: Sequence[Comparison]) -> Comparison | None:
    """Return the comparison that speaks for the gain: the first solved math bench, else the first math task."""
    math = [row for row in rows if task_info(row.task).family == "math" and row.kind == "share"]
    return next((row for row in math if row.metric == "accuracy"), math[0] if math else None)


def cost(rows: Sequence[Comparison]) -> Comparison | None:
    """Return the comparison that speaks for the cost: perplexity per word of running text, else any perplexity."""
    found = [row for row in rows if row.kind == "perplexity"]
    return next((row for row in found if row.metric == "word_perplexity"), found[0] if found else None)


def headline(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return one sentence per fine-tuning: what it gained in mathematics and what the language model paid for it."""
    sentences = []
    for base, tuned, rows in pairs:
        parts = [text for text in (_gain_text(gain(rows)), _cost_text(cost(rows))) if text]
        if parts:
            sentences.append(f"{base} → {tuned}: {' and '.join(parts)}.")
    return tuple(sentences)


def _gain_text(row: Comparison | None) -> str:
    if row is None:
        return ""
    words = {"better": "rose from {} to {}", "worse": "fell from {} to {}", "open": "shows no difference ({} → {})"}
    change = words[row.verdict].format(show(row.metric, row.before), show(row.metric, row.after))
    return f"accuracy on {task_info(row.task).title} {change}"


def _cost_text(row: Comparison | None) -> str:
    if row is None:
        return ""
    words = {"better": "fell by {}", "worse": "rose by {}", "open": "shows no difference ({})"}
    size = change_text(row)
    if size.startswith("×"):
        return f"perplexity on {task_title(row.task, row.metric)} became {size[2:]} times as high"
    return f"perplexity on {task_title(row.task, row.metric)} " + words[row.verdict].format(
        size if row.verdict == "open" else size.lstrip("+−")
    )


def cards(sources: Sequence[Source], pairs: Sequence[Pair]) -> tuple[Card, ...]:
    """Return the key figures of the first fine-tunings and the cost of training; none for a study of many."""
    if len(pairs) > MOST_CARDS:
        return ()
    found = []
    for _, tuned, rows in pairs:
        suffix = f" · {tuned}" if len(pairs) > 1 else ""
        if (row := gain(rows)) is not None:
            figure = f"{show(row.metric, row.before)} → {show(row.metric, row.after)}"
            note = f"{change_text(row)} on {row.n:,} problems{suffix}"
            found.append(Card(task_title(row.task, row.metric), figure, note, row.verdict))
        if (row := cost(rows)) is not None:
            span = f"{show(row.metric, row.before)} → {show(row.metric, row.after)}"
            note = f"{span} on {task_title(row.task, row.metric)}{suffix}"
            found.append(Card("Perplexity, the cost", change_text(row), note, row.verdict))
    return (*found, *(_training_card(source) for source in of_kind(sources, "finetune")[:MOST_CARDS]))


def _training_card(source: Source) -> Card:
    train, parameters = source.record.results["train"], source.record.results.get("parameters", {})
    note = f"{source.label}, {rate(train.get('tokens_per_second'))} tokens/s"
    if parameters.get("trainable") and parameters.get("total"):
        note += f", {percent(parameters['trainable'] / parameters['total'])} of the parameters"
    return Card("Fine-tuning", duration(train.get("seconds")), note)


def notices(sources: Sequence[Source], studies: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return what a reader must know first: substitutions, limits, different machines."""
    found = [text for study in studies for text in study.get("substitutions", [])]
    limits: dict[int, list[int]] = {}
    for source in sources:
        benches = source.record.config.get("bench") or ("",)
        generated = all(bench.startswith("wordproblems") for bench in benches)  # there --limit is the number made
        if source.record.kind in ("evaluate", "solve") and source.record.config.get("limit") and not generated:
            limits.setdefault(int(source.record.config["limit"]), []).append(source.number)
    for limit, numbers in limits.items():
        marks = "".join(f"[{number}]" for number in numbers)
        found.append(f"Only the first {limit:,} items of each task were used in {marks} (--limit {limit}).")
    machines = {source.record.environment.get("gpu") or source.record.environment.get("cpu") for source in sources}
    if len(machines) > 1:
        found.append("The records come from different machines: compare their times only within one record.")
    return tuple(found)


def agreement(sources: Sequence[Source], one: str, two: str) -> str:
    """Return whether two runs of what should be one model wrote the same answers."""
    total, same = identical(sources, one, two)
    verdict = "all" if same == total else f"only {same:,}"
    return (
        f"{one} and {two} were asked the same {total:,} problems: {verdict} of their answers are equal to the last "
        "character."
    )
