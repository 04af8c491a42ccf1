"""What a study would take on this machine: measured speed, the models' shapes and the plan's work, as one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambacus.runtime.records import read_record

if TYPE_CHECKING:
    from mambacus.studies.estimate import Estimate
    from mambacus.studies.plan import Plan


def estimate(plan: Plan) -> tuple[list[Estimate], str]:
    """Measure this device for about a second and estimate every step, the report last.

    Returns:
        The estimates, and one sentence on the device they are for.

    Raises:
        UserError: a model folder whose configuration cannot be read, or a random model of no known size.
    """
    import torch

    from mambacus.measuring.speed import measure_speed
    from mambacus.models.costs import costs_of
    from mambacus.runtime.device import has_bfloat16, resolve_device
    from mambacus.studies.estimate import Speed, dtype_of, estimate_plan, source_of, sources_of

    plan = filled(plan)
    wanted = next((step.config.device for step in plan.steps if hasattr(step.config, "device")), "auto")
    there = torch.cuda.is_available() or not wanted.startswith("cuda")
    device = resolve_device(wanted if there else "cpu")
    made = sources_of(plan)
    costs = {name: costs_of(name) for name in dict.fromkeys(source_of(step, made) for step in plan.steps)}
    widths = {shape.width for shape in costs.values() if shape is not None}
    able = has_bfloat16(device)
    steps = [step for step in plan.steps if step.verb != "merge"]
    if device.type == "cpu":  # torch's products of other dtypes may crawl; only training uses them, where they do not
        steps = [step for step in steps if able and step.verb == "finetune"]
    figures = measure_speed(device, widths, {"float32", *(dtype_of(step, able) for step in steps)})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    where = f"Estimated for this machine ({name})" + ("" if there else f", which has no {wanted}")
    return estimate_plan(plan, costs, Speed(device.type, figures, able)), where


def filled(plan: Plan) -> Plan:
    """Return ``plan`` with what benchmarks leave open decided, for devices that need not be here."""
    from mambacus.bench_plan import fill

    steps = tuple(
        dataclasses.replace(step, config=fill(step.config)) if step.verb == "bench" else step for step in plan.steps
    )
    return dataclasses.replace(plan, steps=steps)


def rows(plan: Plan, estimates: Sequence[Estimate]) -> list[tuple[str, ...]]:
    """Return the rows of the table: number, stage, what, tokens, operations, time, memory, and time taken if done."""
    steps: list[tuple[str, str, Path | None]] = [
        *((step.stage, f"{step.verb} {step.label}", step.record) for step in plan.steps),
        ("report", "all records", None),
    ]
    found: list[tuple[str, ...]] = []
    for place, ((stage, what, record), guess) in enumerate(zip(steps, estimates, strict=True), start=1):
        took = seconds_text(read_record(record).seconds) if record is not None and record.exists() else ""
        known = stage != "report" and not guess.unknown
        found.append((
            str(place), stage, what,
            count_text(guess.tokens) if guess.tokens else "" if known or stage == "report" else "?",
            count_text(guess.flops) if guess.flops else "" if known or stage == "report" else "?",
            "?" if guess.seconds is None else seconds_text(guess.seconds),
            f"{guess.memory_bytes / 1e9:.1f} GB" if guess.memory_bytes else "" if stage == "report" else "?",
            took,
        ))  # fmt: skip
    return found


def print_estimates(plan: Plan, estimates: Sequence[Estimate], where: str) -> None:
    """Print the table, its sums, and how far to trust it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    lines = rows(plan, estimates)
    measured = any(line[-1] for line in lines)
    for heading in ("#", "stage", "step"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "FLOP", "time", "memory", *(["took"] if measured else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(line if measured else line[:-1]))
    seconds = sum(guess.seconds or 0.0 for guess in estimates)
    flops = sum(guess.flops or 0.0 for guess in estimates)
    memory = max((guess.memory_bytes or 0.0 for guess in estimates), default=0.0)
    unknown = list(dict.fromkeys(guess.unknown for guess in estimates if guess.unknown))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{where}: {seconds_text(seconds)}, {count_text(flops)} FLOP, at most {memory / 1e9:.1f} GB at once"
                  f"{', without what is unknown' if unknown else ''}.", style="bold", markup=False)  # fmt: skip
    Console(highlight=False).print(table)
    console.print(
        "An estimate, good to about a factor of two on an idle machine (docs/study.md); downloads not counted."
    )
    for reason in unknown:
        console.print(f"unknown: {reason}", markup=False)


def as_record(guess: Estimate) -> dict[str, float | str | None]:
    """Return an estimate for the study's ledger, in whole tokens, operations and bytes."""
    values = dataclasses.asdict(guess)
    return {
        key: value if value is None or isinstance(value, str) else round(value, 1 if key == "seconds" else 0)
        for key, value in values.items()
    }


def seconds_text(seconds: float) -> str:
    """Return a time to two places at most: ``8 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def count_text(count: float) -> str:
    """Return a number with the letter of its thousands: ``950``, ``83 k``, ``1.2 M``, ``4.5 T``."""
    for letter in ("", " k", " M", " G", " T", " P"):
        if count < 999.5:
            return f"{count:.1f}{letter}" if letter and count < 10 else f"{count:.0f}{letter}"
        count /= 1000
    return f"{count:.0f} E"
