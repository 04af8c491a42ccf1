"""``finetune --sweep``: the same training over methods, rates and seeds, compared in one record."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import from_mapping
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_record

Check = Callable[[Sequence[Any]], Iterable[tuple[Any, str]]]  # runs -> the faults found early, with the run of each
_FIXED = ("model", "out", "resume", "sweep", "collect")
_WHERE = ("out", "resume", "sweep", "collect", "save_every", "data_dir", "cache")  # runs may differ in these


def grid(words: Sequence[str], config_class: type) -> list[dict[str, Any]]:
    """Return the settings of every run for words like ``method=lora|dora`` and ``lr=1e-3|5e-4``.

    Raises:
        UserError: a word of another form, an unknown or fixed setting, one that stands twice, or a value that does or
            has the wrong type.
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
        if key in axes:
            raise UserError(f"--sweep: {key} stands twice; give its values as {key}=VALUE|VALUE")
        axes[key] = [from_mapping({key: value}, hints, "--sweep")[key] for value in values.split("|")]
        repeated = [value for place, value in enumerate(axes[key]) if value in axes[key][:place]]
        if repeated:
            raise UserError(f"--sweep: {key}: {repeated[0]} stands twice (| separates values, so none can hold one)")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(config: Any, run: Callable[[Any], Record], check: Check) -> Record:
    """Train every point of the grid into a folder of its own and write one comparison record; finished runs are kept.

    ``results``: ``axes`` (the settings that vary), ``runs``: for each its settings, parameters, losses, seconds,
    memory and the check's figures; ``one_at_a_time``: no two runs were at work at once, so their seconds compare.

    With ``config.collect`` nothing is trained: all runs must be there, and the record carries their environment.

    Raises:
        UserError: as `grid`; faults that ``check`` finds, of all runs before the first begins, or that a run finds in
            what was loaded; when collecting, runs are missing or were made in another way.
    """
    watch = Stopwatch()
    points = grid(config.sweep, type(config))
    ones = [dataclasses.replace(config, **point, out=config.out / _name(point), sweep=()) for point in points]
    _check(ones, check, config.collect)
    records = _finished(ones) if config.collect else []
    if not config.collect:
        for place, (point, one) in enumerate(zip(points, ones, strict=True), 1):
            print(f"sweep {place} of {len(points)}: {', '.join(f'{key} {value}' for key, value in point.items())}")
            records.append(run(dataclasses.replace(one, resume=(one.out / "run.json").is_file())))
            gc.collect()  # a model and its trainer hold each other: without this the next run begins beside them
    rows = [
        point | _figures(record.results) | {"folder": one.out.name}
        for point, one, record in zip(points, ones, records, strict=True)
    ]
    spans = sorted(_span(record) for record in records)
    results = {"axes": list(points[0]), "runs": rows, "one_at_a_time": _in_turn(spans)}
    record = watch.record("sweep", f"{Path(config.model).name}: {' x '.join(points[0])}", config, results)
    if config.collect:
        began, ended = spans[0][0], max(end for _, end in spans)
        record = dataclasses.replace(
            record, environment=records[0].environment, started_at=began.isoformat(timespec="seconds"),
            seconds=round((ended - began).total_seconds(), 3),
        )  # fmt: skip
    write_record(config.out / "record.json", record)
    return record


def _check(ones: Sequence[Any], check: Check, collecting: bool) -> None:
    """Refuse a grid of which a run would be refused, or two would share a folder.

    Raises:
        UserError: naming the faults of all runs, each once.
    """
    faults: dict[str, str] = {}
    taken: set[Path] = set()
    for one in ones:
        if one.out in taken:
            faults.setdefault(f"two runs would share the folder {one.out.name}", "")
        taken.add(one.out)
    if not collecting:
        for one, fault in check(ones):
            faults.setdefault(fault, f"{one.out.name}: ")
    if faults:
        raise UserError("--sweep: " + "; ".join(where + fault for fault, where in faults.items()))


def _finished(ones: Sequence[Any]) -> list[Record]:
    """Return the records of finished runs, none of which is made again.

    Raises:
        UserError: naming every run that is missing, has other settings than asked for, or ran on another machine.
    """
    faults: list[str] = []
    records: list[Record] = []
    for one in ones:
        path = one.out / "record.json"
        if not path.is_file():
            faults.append(f"{one.out.name}: no record")
            continue
        record = read_record(path)
        asked = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(one).items()}
        faults += [
            f"{one.out.name}: {key} is {record.config[key]!r}, asked for {value!r}"
            for key, value in asked.items()
            if key not in _WHERE and record.config.get(key, value) != value
        ]
        if records and record.environment != records[0].environment:
            faults.append(f"{one.out.name}: another environment than {ones[0].out.name}")
        records.append(record)
    if faults:
        raise UserError("--collect: " + "; ".join(faults))
    return records


_Span = tuple[datetime.datetime, datetime.datetime]


def _span(record: Record) -> _Span:
    began = datetime.datetime.fromisoformat(record.started_at)
    return began, began + datetime.timedelta(seconds=record.seconds)


def _in_turn(spans: Sequence[_Span]) -> bool:
    """Tell whether each of the sorted spans ends before the next begins; starts are known to the second."""
    second = datetime.timedelta(seconds=1)
    return all(end - second <= began for (_, end), (began, _) in itertools.pairwise(spans))


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
        "peak_memory_of": train.get("peak_memory_of", "process"),
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
