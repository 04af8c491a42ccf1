"""``finetune --sweep``: the same training over methods, rates and seeds, compared in one record."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import from_mapping
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, write_record

_FIXED = ("model", "out", "resume", "sweep")


def grid(words: Sequence[str], config_class: type) -> list[dict[str, Any]]:
    """Return the settings of every run for words like ``method=lora|dora`` and ``lr=1e-3|5e-4``.

    Raises:
        UserError: a word of another form, an unknown or fixed setting, or a value of the wrong type.
    """
    axes: dict[str, list[Any]] = {}
    hints = typing.get_type_hints(config_class)
    for word in words:
        key, equals, values = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not values:
            raise UserError(f"--sweep: expected SETTING=VALUE|VALUE, got {word!r}")
        if key in _FIXED:
            raise UserError(f"--sweep: {key} is the same for all runs")
        axes[key] = [from_mapping({key: value}, hints, "--sweep")[key] for value in values.split("|")]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(config: Any, run: Callable[[Any], Record]) -> Record:
    """Train every point of the grid into a folder of its own and write one comparison record; finished runs are kept.

    ``results``: ``axes`` (the settings that vary), ``runs``: for each its settings, parameters, losses, seconds,
    memory and the check's figures.

    Raises:
        UserError: as `grid`, or a run was refused.
    """
    watch = Stopwatch()
    points = grid(config.sweep, type(config))
    rows = []
    for place, point in enumerate(points, 1):
        folder = config.out / _name(point)
        print(f"sweep {place} of {len(points)}: {', '.join(f'{key} {value}' for key, value in point.items())}")
        one = dataclasses.replace(config, **point, out=folder, sweep=(), resume=(folder / "run.json").is_file())
        rows.append(point | _figures(run(one).results) | {"folder": folder.name})
    results = {"axes": list(points[0]), "runs": rows}
    record = watch.record("sweep", f"{Path(config.model).name}: {' x '.join(points[0])}", config, results)
    write_record(config.out / "record.json", record)
    return record


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    train = results["train"]
    return {
        "trainable": results["parameters"]["trainable"],
        "learning_rate": results["learning_rate"],
        "steps": train["steps"],
        "loss_last": train["loss_last"],
        "seconds": train["seconds"],
        "tokens_per_second": train["tokens_per_second"],
        "peak_memory_bytes": train["peak_memory_bytes"],
        "check": results.get("check", {}),
    }


def _name(point: Mapping[str, Any]) -> str:
    """Return a folder name for one point."""
    return re.sub(r"[^\w.+-]+", "-", "_".join(f"{key}-{value}" for key, value in point.items()))


def table(record: Record) -> list[str]:
    """Return the comparison as lines for the screen."""
    axes = record.results["axes"]
    lines = ["  ".join([*(f"{axis:>16}" for axis in axes), "  trainable", " loss", "seconds", "accuracy"])]
    for row in record.results["runs"]:
        accuracy = [found["after"] for what, found in row["check"].items() if what.startswith("accuracy")]
        shown = [f"{row[axis]!s:>16}" for axis in axes]
        shown += [f"{row['trainable']:>11,}", f"{row['loss_last']:.3f}", f"{row['seconds']:7.1f}"]
        lines.append("  ".join([*shown, f"{accuracy[0]:8.1%}" if accuracy else "       -"]))
    return lines
