"""Tables of scores, training and records: each function turns records into the cells of one table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mambacus.reporting.compare import Comparison
from mambacus.reporting.formats import duration, finite, fixed, p_text, percent, rate, reference, show, size, whole
from mambacus.reporting.lineup import Lineup
from mambacus.reporting.metrics import metric_title, task_info, task_title
from mambacus.reporting.panels import change_text
from mambacus.reporting.published import NOTHING, Published
from mambacus.reporting.radar_shape import published_note
from mambacus.reporting.scores import Score, Scores
from mambacus.reporting.sources import Source, of_kind, shown_path
from mambacus.reporting.table import Cell, Table, make_table
from mambacus.runtime.records import read_record


def comparison_table(rows: Sequence[Comparison], base: str, tuned: str, scores: Scores) -> Table:
    """Before and after, one row per metric, with interval, items gained and lost, p-values and verdict."""
    words = {"better": "better", "worse": "worse", "open": "not shown"}
    body: list[list[Cell | str]] = []
    for row in rows:
        refs = [score.source.number for label in (base, tuned) if (score := scores.get(label, row.key)) is not None]
        low, high = (change_text(dataclasses.replace(row, change=end)) for end in (row.low, row.high))
        unit = low.split(" ", 1)[1] if " " in low and not low.startswith("×") else ""
        changed = "" if row.gained is None else f"+{row.gained} / −{row.lost}"
        body.append(
            [
                Cell(task_title(row.task, row.metric), metric_title(row.metric) + reference(refs)),
                f"{row.n:,}",
                show(row.metric, row.before),
                show(row.metric, row.after),
                Cell(change_text(row), f"{low.removesuffix(unit).strip()} to {high}"),
                changed,
                Cell(p_text(row.p_adjusted), f"alone {p_text(row.p)}"),
                Cell(words[row.verdict], style=row.verdict),
            ]
        )
    columns = (
        "Task",
        "#Items",
        f"#{base}",
        f"#{tuned}",
        "#Change, 95 %",
        "#Gained / lost",
        "#p, Holm",
        "Verdict",
    )
    return make_table(f"before-after {tuned}", columns, body)


def score_table(scores: Scores, labels: Sequence[str], published: Published = NOTHING) -> Table:
    """Every metric of every task for every model, with intervals; the best measured one of each row is marked."""
    body: list[list[Cell | str]] = []
    for key in scores.keys:
        found = [scores.get(label, key) for label in labels]
        values = [score.value for score in found if score is not None and math.isfinite(score.value)]
        if not any(found):
            continue
        up = next(score.higher_is_better for score in found if score is not None)
        best = (max if up else min)(values) if len(set(values)) > 1 else None
        cells: list[Cell | str] = [Cell(task_title(*key), f"{metric_title(key[1])} {'↑' if up else '↓'}")]
        for label, score in zip(labels, found, strict=True):
            cells.append(_score_cell(score, best, published_note(published, label, key)))
        body.append(cells)
    return make_table("all scores", ("Task", *(f"#{label}" for label in labels)), body)


def _score_cell(score: Score | None, best: float | None, printed: str) -> Cell:
    if score is None:
        return Cell("–", printed)
    metric = score.metric
    span = "" if score.low is None else f"{show(metric, score.low)} to {show(metric, score.high)}, "
    note = f"{span}n = {score.n:,}{reference([score.source.number])}"
    style = "best" if best is not None and score.value == best else ""
    return Cell(show(metric, score.value), "; ".join(filter(None, (note, printed))), style)


def solve_table(sources: Sequence[Source], lineup: Lineup) -> Table:
    """Accuracy with its Wilson interval and what happened to the answers, per model and bench."""
    order = {model.label: place for place, model in enumerate(lineup.shown)}
    rows = [
        (bench, source, cell)
        for source in of_kind(sources, "solve")
        if source.label in order
        for bench, cell in source.record.results["benches"].items()
    ]
    rows.sort(key=lambda row: (row[0], order[row[1].label]))
    body: list[list[Cell | str]] = [
        [
            Cell(task_info(bench).title, f"{source.label}{reference([source.number])}"),
            f"{cell['n']:,}",
            f"{cell['correct']:,}",
            Cell(percent(cell["accuracy"]), f"{percent(cell['wilson95'][0])} to {percent(cell['wilson95'][1])}"),
            percent(cell["parse_rate"]),
            percent(cell["truncation_rate"]),
            percent(cell["eos_rate"]),
            f"{cell['generated_tokens']:,}",
            rate(cell["tokens_per_second"]),
        ]
        for bench, source, cell in rows
    ]
    columns = (
        "Bench",
        "#Problems",
        "#Right",
        "#Accuracy, 95 %",
        "#Answer found",
        "#Cut off",
        "#Ended itself",
        "#Tokens",
        "#Tokens/s",
    )
    return make_table("solving", columns, body)


def training_table(sources: Sequence[Source]) -> Table:
    """What each training run trained, on what, and how fast."""
    runs = [source for source in sources if source.record.kind in ("finetune", "pretrain")]
    lines: list[tuple[str, Any]] = [
        ("Method", lambda r: str(r.config.get("method", "–"))),
        ("Data", lambda r: str(r.config.get("data", "–"))),
        ("Trained parameters", lambda r: _trained(r.results.get("parameters", {}))),
        ("Modules", lambda r: _listed(r.results.get("parameters", {}).get("targets"))),
        ("Examples kept", lambda r: _kept(r.results.get("data", {}))),
        ("Dropped", lambda r: _counts(r.results.get("data", {}).get("dropped"))),
        ("Packing efficiency", lambda r: percent(r.results.get("data", {}).get("packing_efficiency"))),
        ("Learning rate", lambda r: _peak_rate(r)),
        ("Steps", lambda r: whole(r.results["train"].get("steps"))),
        ("Tokens", lambda r: whole(r.results["train"].get("tokens"))),
        ("Tokens/s", lambda r: rate(r.results["train"].get("tokens_per_second"))),
        ("Time", lambda r: duration(r.results["train"].get("seconds"))),
        (
            "Loss, first → last",
            lambda r: f"{_loss(r.results['train'].get('loss_first'))} → {_loss(r.results['train'].get('loss_last'))}",
        ),
        ("Peak memory", lambda r: size(r.results["train"].get("peak_memory_bytes"))),
    ]
    body: list[list[Cell | str]] = [[name, *(read(source.record) for source in runs)] for name, read in lines]
    return make_table("training", ("", *(f"#{s.label}{reference([s.number])}" for s in runs)), body)


def merge_table(sources: Sequence[Source]) -> Table:
    """The gate each merge passed."""
    body: list[list[Cell | str]] = [
        [
            source.label + reference([source.number]),
            str(gate.get("prompts", "–")),
            fixed(gate["max_logit_difference"], ".1e"),
            fixed(gate["tolerance"], ".1e"),
            "yes" if source.record.results.get("untied") else "no",
        ]
        for source in of_kind(sources, "merge")
        for gate in [source.record.results["gate"]]
    ]
    columns = ("Model", "#Prompts", "#Largest logit difference", "#Allowed", "Head untied")
    about = "A merge is written only when its logits agree with the attached adapter’s on real prompts."
    return make_table("merge", columns, body, title="Merging", about=about)


def record_table(sources: Sequence[Source], root: Path) -> Table:
    """Every record with its file and the command that makes it again."""
    body: list[list[Cell | str]] = []
    for source in sources:
        body.append(
            [
                source.mark,
                Cell(source.record.kind, source.label),
                Cell(shown_path(source, root), style="code"),
                Cell(source.command, style="code"),
                source.record.started_at,
                duration(source.record.seconds),
            ]
        )
    return make_table("records", ("", "Record", "File", "Command", "Started (UTC)", "#Time"), body)


def environment_table(sources: Sequence[Source]) -> Table:
    """Machine and versions: one column per distinct environment, with the records made in it."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for source in sources:
        environment = {key: value for key, value in source.record.environment.items() if key != "torch_threads"}
        groups.setdefault(json.dumps(environment, sort_keys=True), (environment, []))[1].append(source.number)
    flat = [({**env, **env.get("packages", {})}, numbers) for env, numbers in groups.values()]
    names = [name for name in dict.fromkeys(key for env, _ in flat for key in env) if name != "packages"]
    body: list[list[Cell | str]] = [[name, *(_plain(env.get(name)) for env, _ in flat)] for name in names]
    return make_table("environment", ("", *(_numbers(numbers) for _, numbers in flat)), body)


def _numbers(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"[{numbers[0]}–{numbers[-1]}]"
    return "".join(f"[{number}]" for number in numbers)


def _trained(parameters: dict[str, Any]) -> str:
    trainable, total = parameters.get("trainable"), parameters.get("total")
    if not trainable or not total:
        return whole(total)
    return f"{trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"


def _kept(data: dict[str, Any]) -> str:
    if "kept" not in data:
        return "–"
    text = f"{data['kept']:,} of {data['rows']:,}"
    return text + (f", {data['truncated']:,} truncated" if data.get("truncated") else "")


def _counts(counts: dict[str, int] | None) -> str:
    return (
        ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none"
        if counts is not None
        else "–"
    )


def _peak_rate(record: Any) -> str:
    rates = [
        rate for row in record.results.get("history", []) if (rate := finite(row.get("learning_rate"))) is not None
    ]
    return f"{max(rates):.2g} (highest)" if rates else "–"


def _loss(value: Any) -> str:
    return fixed(value, ".3f")


def _listed(value: Any) -> str:
    return "–" if not value else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)


def summary_rows(comparisons: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Return the comparisons of a report record as rows for a terminal.

    Columns: task and metric, tuned model, before, after, change over its interval, adjusted p-value, verdict.
    """
    words = {"better": "better", "worse": "worse", "open": "not shown"}
    fields = {field.name for field in dataclasses.fields(Comparison)}
    found = []
    for values in comparisons:
        row = Comparison(**{key: value for key, value in values.items() if key in fields})
        low, high = (change_text(dataclasses.replace(row, change=end)) for end in (row.low, row.high))
        found.append([
            f"{task_info(row.task).title}\n{metric_title(row.metric)}", row.tuned, show(row.metric, row.before),
            show(row.metric, row.after), f"{change_text(row)}\n{low.split(' ')[0]} to {high.split(' ')[0]}",
            p_text(row.p_adjusted), words[row.verdict],
        ])  # fmt: skip
    return found


def speed_lines(paths: Iterable[Path]) -> list[str]:
    """Return one line on the speed of every finetune and solve record among ``paths``."""
    lines = []
    for path in paths:
        record = read_record(path)
        if record.kind == "finetune":
            train = record.results["train"]
            lines.append(f"finetune: {duration(train.get('seconds'))}, {rate(train.get('tokens_per_second'))} tokens/s")
        if record.kind == "solve":
            for bench, cell in record.results["benches"].items():
                lines.append(f"solve {bench} with {record.label}: {rate(cell['tokens_per_second'])} tokens/s")
    return lines
