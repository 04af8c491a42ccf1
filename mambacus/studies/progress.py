"""What of a plan is done: a record made with equal settings, and not before what it is made from, is not made again."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record, write_record
from mambacus.studies.plan import Plan, Step, settings_of
from mambacus.studies.recipe import Recipe

LEDGER = "study.json"


def is_done(step: Step, out: Path) -> bool:
    """Return whether ``step`` need not run again.

    Raises:
        UserError: its record was made with other settings or before what it is made from; names what to remove.
    """
    if not step.record.exists():
        return False
    record = read_record(step.record)
    theirs = settings_of(record.config, _out_of(record, step, out))
    mine = settings_of(dataclasses.asdict(step.config), str(out))
    changed = sorted(key for key in {*theirs, *mine} if theirs.get(key) != mine.get(key))
    remedy = f"remove {_made(step)} to make it again, or choose another --out"
    if changed:
        raise UserError(
            f"stage {step.name}: {step.record} was made with other settings ({', '.join(changed)}); {remedy}"
        )
    for needed in step.needs:
        if not needed.exists():
            raise UserError(f"stage {step.name}: {step.record} is made from {needed}, which is gone; {remedy}")
        if _finished(read_record(needed)) > _started(record):
            raise UserError(f"stage {step.name}: {step.record} is older than {needed}, which it is made from; {remedy}")
    return True


def _made(step: Step) -> Path:
    """Return what a user removes to have a step run again."""
    return step.record.parent if step.record.name == "record.json" else step.record


def _out_of(record: Record, step: Step, out: Path) -> str:
    """Return the study folder as the record knew it, so that a moved study is still recognised."""
    mine, theirs = str(step.config.out), str(record.config.get("out", ""))
    tail = mine.removeprefix(str(out))
    return theirs.removesuffix(tail) if theirs.endswith(tail) else str(out)


def _started(record: Record) -> datetime.datetime:
    return datetime.datetime.fromisoformat(record.started_at)


def _finished(record: Record) -> datetime.datetime:
    # started_at is cut to whole seconds: a step started in the same second must not look older
    return _started(record) + datetime.timedelta(seconds=int(record.seconds) - 1)


def prepare(step: Step) -> Any:
    """Clear what a killed attempt at ``step`` left behind, and return the configuration to run it with."""
    if step.verb == "finetune" and (step.config.out / "run.json").exists():
        return dataclasses.replace(step.config, resume=True)
    if step.verb == "merge" and step.config.out.exists():
        shutil.rmtree(step.config.out)  # a merge without a record is half written; it is made again in seconds
    if step.verb == "bench":
        return dataclasses.replace(step.config, resume=True, overwrite=True)  # rows of finished cases are kept
    if hasattr(step.config, "overwrite"):
        return dataclasses.replace(step.config, overwrite=True)  # only items without their record can be there
    return step.config


def write_ledger(plan: Plan, recipe: Recipe, config: Any, watch: Stopwatch, guesses: dict[str, Any]) -> Record:
    """Write ``study.json``: who is who, every step with its command and record, and what differs from the recipe.

    Args:
        plan: of the study.
        recipe: that it comes from.
        config: of the command.
        watch: started with the command.
        guesses: ``steps``, one estimate for each step, and ``estimated_for``, the device.
    """
    steps = [
        {
            "stage": step.stage, "verb": step.verb, "label": step.label, "command": step.command,
            "record": str(step.record.relative_to(plan.out)), "done": step.record.exists(), "estimate": guess,
            "seconds": read_record(step.record).seconds if step.record.exists() else None,
        }
        for step, guess in zip(plan.steps, guesses["steps"], strict=False)  # the last estimate is the report's
    ]  # fmt: skip
    results = {
        "title": recipe.title, "description": recipe.description, "models": plan.models, "steps": steps,
        "estimated_for": guesses["estimated_for"], "substitutions": plan.notes,
    }  # fmt: skip
    record = watch.record("study", recipe.name, config, results)
    write_record(plan.out / LEDGER, record)
    return record
