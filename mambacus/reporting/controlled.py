"""The controlled study: Mamba against a Transformer of equal size, data and effort, beside what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambacus.reporting.charts import Chart, Figure, Series, Value, make_chart
from mambacus.reporting.formats import percent, reference
from mambacus.reporting.scales import linear_scale, steps_scale
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, make_table

COLOURS = {"mamba": 1, "transformer": 2}
TITLES = {"mamba": "Mamba", "transformer": "Transformer"}


def controlled_figures(sources: Sequence[Source]) -> list[Figure]:
    """Return one figure per task: accuracy with its interval over the task's size, one curve per arm."""
    figures = []
    for source in of_kind(sources, "controlled"):
        results = source.record.results
        for task, x_name in dict.fromkeys((row["task"], row["x_name"]) for row in results["summary"]):
            rows = [row for row in results["summary"] if (row["task"], row["x_name"]) == (task, x_name)]
            notes = [f"Predicted: {one['text']}" for one in results["predictions"] if one["task"] == task]
            title = f"{_words(task)}{reference([source.number])}"
            figures.append(Figure(f"controlled {task} {source.number}", title, (_chart(x_name, rows),), tuple(notes)))
    return figures


def _chart(x_name: str, rows: Sequence[dict[str, Any]]) -> Chart:
    series = []
    for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        values = tuple(
            Value(float(row["x"]), float(row["mean"]), _tip(row, x_name), float(row["low95"]), float(row["high95"]))
            for row in sorted(rows, key=lambda row: row["x"])
            if row["arm"] == arm
        )
        series.append(Series(TITLES.get(arm, arm), COLOURS.get(arm, 3 + place), values))
    across = steps_scale((float(row["x"]) for row in rows), lambda value: f"{value:,g}")
    up = linear_scale((0.0, 1.0), lambda value: f"{100 * value:.0f} %")
    return make_chart("Accuracy, 95 %", (_words(x_name).lower(), across), ("", up), series)


def _tip(row: dict[str, Any], x_name: str) -> str:
    figures = f"{percent(row['mean'])}, 95 % {percent(row['low95'])} to {percent(row['high95'])}"
    where = f"{_words(x_name).lower()} {row['x']:,g}"
    return f"{TITLES.get(row['arm'], row['arm'])}\n{where}: {figures}, {row['seeds']} seeds"


def controlled_table(sources: Sequence[Source]) -> Table:
    """One row per task and size: both arms with their intervals over seeds."""
    body: list[list[Cell | str]] = []
    found = of_kind(sources, "controlled")
    arms = list(dict.fromkeys(row["arm"] for source in found for row in source.record.results["summary"]))
    for source in found:
        cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in source.record.results["summary"]:
            cells.setdefault((row["task"], row["x_name"], row["x"]), {})[row["arm"]] = row
        for (task, x_name, x), sides in cells.items():
            head = Cell(_words(task), f"{_words(x_name).lower()}{reference([source.number])}")
            body.append([head, f"{x:,g}", *(_cell(sides.get(arm)) for arm in arms)])
    return make_table("controlled", ("Task", "#Size", *(f"#{TITLES.get(arm, arm)}, 95 %" for arm in arms)), body)


def _cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell("–")
    return Cell(percent(row["mean"]), f"{percent(row['low95'])} to {percent(row['high95'])}, {row['seeds']} seeds")


def _words(name: str) -> str:
    text = name.replace("_", " ").replace("-", " ")
    return text[:1].upper() + text[1:] if text.islower() else text
