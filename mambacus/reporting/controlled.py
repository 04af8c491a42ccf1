"""The controlled study: Mamba against a Transformer of equal size, data and effort, beside what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambacus.reporting.charts import Chart, Crossing, Figure, Series, Value, make_chart
from mambacus.reporting.formats import number, percent, reference
from mambacus.reporting.scales import linear_scale, steps_scale
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, make_table

Arm = tuple[str, int | None]  # name, and the size of its state where several are compared


def controlled_figures(sources: Sequence[Source]) -> list[Figure]:
    """Return one figure per task: accuracy with its interval over the task's size, one curve per arm.

    Beside it stands what was predicted and what was found.
    """
    figures = []
    for source in of_kind(sources, "controlled"):
        results = source.record.results
        for task, x_name in dict.fromkeys((row["task"], row["x_name"]) for row in results["summary"]):
            rows = [row for row in results["summary"] if (row["task"], row["x_name"]) == (task, x_name)]
            trained = [x for row in results["rows"] if row["task"] == task for x in row.get("trained_x", ())]
            chart = _chart(x_name, rows, max(trained, default=None))
            name, numbers = f"controlled {task} {source.number}", (source.number,)
            figures.append(Figure(name, _words(task), (chart,), numbers, _beside(results, task)))
    return figures


def _beside(results: dict[str, Any], task: str) -> tuple[str, ...]:
    """Return every prediction for a task, each followed by what was found where the runs have been judged."""
    found = {row["prediction"]: row["text"] for row in results.get("verdicts", []) if row["task"] == task}
    notes = []
    for one in results["predictions"]:
        if one["task"] == task:
            notes.append(f"Predicted: {one['text']}")
            notes += [f"Found: {found[one['text']]}"] if one["text"] in found else []
    return tuple(notes)


def _chart(x_name: str, rows: Sequence[dict[str, Any]], trained: float | None) -> Chart:
    series = []
    for place, arm in enumerate(dict.fromkeys(_arm(row) for row in rows)):
        values = [_value(row, x_name) for row in sorted(rows, key=lambda row: row["x"]) if _arm(row) == arm]
        series.append(Series(_label(arm), _colour(arm, place), tuple(values)))
    across = steps_scale((float(row["x"]) for row in rows), lambda value: f"{value:,g}")
    up = linear_scale((0.0, 1.0), lambda value: f"{100 * value:.0f} %")
    marks = []
    if trained is not None and trained < max(row["x"] for row in rows):
        words = f"trained up to {trained:,g}"
        marks.append(Crossing(float(trained), words, f"{words} {x_name}; what is right of it is generalisation"))
    return make_chart("Accuracy, 95 %", (_words(x_name).lower(), across), ("", up), series, marks)


def _value(row: dict[str, Any], x_name: str) -> Value:
    tip = f"{_label(_arm(row))}\n{_words(x_name).lower()} {row['x']:,g}: {percent(row['mean'])}, 95 %: {_span(row)}"
    return Value(float(row["x"]), float(row["mean"]), tip, number(row["low95"]), number(row["high95"]))


def controlled_table(sources: Sequence[Source]) -> Table:
    """One row per task and size: every arm with its interval over seeds."""
    found = of_kind(sources, "controlled")
    arms = list(dict.fromkeys(_arm(row) for source in found for row in source.record.results["summary"]))
    body: list[list[Cell | str]] = []
    for source in found:
        cells: dict[tuple[Any, ...], dict[Arm, dict[str, Any]]] = {}
        for row in source.record.results["summary"]:
            cells.setdefault((row["task"], row["x_name"], row["x"]), {})[_arm(row)] = row
        for (task, x_name, x), sides in cells.items():
            head = Cell(_words(task), f"{_words(x_name).lower()}{reference([source.number])}")
            body.append([head, f"{x:,g}", *(_cell(sides.get(arm)) for arm in arms)])
    return make_table("controlled", ("Task", "#Size", *(f"#{_label(arm)}, 95 %" for arm in arms)), body)


def controlled_notes(sources: Sequence[Source]) -> tuple[str, ...]:
    """Return what a reader must know of each study: what it asks, runs that are missing, rates at a grid's end."""
    notes = []
    for source in of_kind(sources, "controlled"):
        results, mark = source.record.results, reference([source.number])
        notes += [results["question"].strip() + mark] if results.get("question") else []
        runs = results.get("runs", {"planned": 0, "finished": 0})
        if runs["finished"] < runs["planned"]:
            notes.append(f"Only {runs['finished']:,} of {runs['planned']:,} runs are finished{mark}.")
        notes += [f"{note}{mark}." for note in results.get("notes", [])]
    return tuple(notes)


def _cell(row: dict[str, Any] | None) -> Cell:
    return Cell("–") if row is None else Cell(percent(row["mean"]), _span(row))


def _span(row: dict[str, Any]) -> str:
    if row["low95"] is None or row["high95"] is None:
        return "one seed, no interval"
    return f"{percent(row['low95'])} to {percent(row['high95'])}, {row['seeds']} seeds"


def _arm(row: dict[str, Any]) -> Arm:
    return row["arm"], row.get("d_state")


def _label(arm: Arm) -> str:
    name = {"mamba": "Mamba", "transformer": "Transformer"}.get(arm[0], arm[0])
    return name if arm[1] is None else f"{name}, state {arm[1]}"


def _colour(arm: Arm, place: int) -> int:
    """Return orange for the Transformer, and blue, green, violet ... for the Mambas."""
    return 2 if arm[0] == "transformer" else (1, 3, 4, 5, 6, 7)[place % 6]


def _words(name: str) -> str:
    text = name.replace("_", " ").replace("-", " ")
    return text[:1].upper() + text[1:] if text.islower() else text
