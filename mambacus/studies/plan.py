"""The plan: which commands a recipe stands for, in order, with the settings and the record of each."""

from __future__ import annotations

import dataclasses
import json
import shlex
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambacus.runtime.config import check, from_mapping
from mambacus.runtime.errors import UserError
from mambacus.studies.recipe import ModelEntry, Recipe, Variant

STAGES = ("baseline", "finetune", "merge", "evaluate", "solve", "check", "bench", "report")
RECORD = "record.json"
_VOLATILE = ("out", "overwrite", "resume")  # settings that say where and how, not what


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What the command line changes in a recipe.

    Attributes:
        limit: documents a task, problems a bench and optimiser steps a fine-tuning; 0 leaves the recipe's.
        data_dir: local data folder; with it the variants' ``data_offline`` takes the place of ``data``.
        device: device of every command that takes one; empty leaves the recipe's.
    """

    limit: int = 0
    data_dir: Path | None = None
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of one command.

    Attributes:
        stage: one of `STAGES`.
        verb: the command.
        label: the model (or benchmark) it is about.
        config: the command's configuration.
        record: the JSON record the call leaves.
        needs: records that must be there first.
    """

    stage: str
    verb: str
    label: str
    config: Any
    record: Path
    needs: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Stage and label in words."""
        return f"{self.stage}: {self.verb} {self.label}"

    @property
    def command(self) -> str:
        """The command line that does the same."""
        return command_line(self.verb, self.config)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of a study before the report.

    Attributes:
        out: the study's folder.
        steps: in order.
        models: rows ``label, role, base, group`` for the report; roles as in `mambacus.reporting.lineup.ROLES`.
        notes: what differs from the recipe, one sentence each.
    """

    out: Path
    steps: tuple[Step, ...]
    models: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def make_plan(recipe: Recipe, out: Path, configs: Mapping[str, type], overrides: Overrides) -> Plan:
    """Lay out every step of ``recipe``.

    Args:
        recipe: the study.
        out: its folder; records go to ``<stage or verb>/<label>`` below it.
        configs: verb -> configuration class, for finetune, merge, evaluate, solve, bench and bench generation.
        overrides: changes from the command line.

    Raises:
        UserError: a setting the command does not know, of the wrong type or out of range, or a required one that is
            missing.
    """
    planner = _Planner(recipe, out, configs, overrides)
    for entry in recipe.models:
        planner.measure(entry.label, entry.source, "baseline", "baseline")
        planner.models.append({"label": entry.label, "role": entry.role, "base": None, "group": entry.group})
    tuned = [
        (entry, planner.tune(entry, variant))
        for entry in recipe.models
        if entry.role == "subject"
        for variant in recipe.finetune
    ]
    for entry, run in tuned:
        planner.merge(run)
        planner.models.append({"label": run.label, "role": "tuned", "base": entry.label, "group": entry.group})
    for _, run in tuned:
        planner.measure(run.label, str(run.model), "evaluate", "solve", needs=(run.made_by,), only="evaluate")
    for _, run in tuned:
        planner.measure(run.label, str(run.model), "evaluate", "solve", needs=(run.made_by,), only="solve")
    if recipe.check_attached:
        for entry, run in tuned:
            planner.check(entry, run)
    planner.bench()
    order = {stage: place for place, stage in enumerate(STAGES)}
    steps = sorted(planner.steps, key=lambda step: order[step.stage])
    return Plan(out, tuple(steps), tuple(planner.models), tuple(planner.notes))


@dataclasses.dataclass(frozen=True)
class _Tuned:
    """A fine-tuning: its label, its folder, where the usable model will lie and which record makes it."""

    label: str
    folder: Path
    model: Path
    made_by: Path
    merged: bool


class _Planner:
    def __init__(self, recipe: Recipe, out: Path, configs: Mapping[str, type], overrides: Overrides) -> None:
        self.recipe, self.out, self.configs, self.overrides = recipe, out, configs, overrides
        self.steps: list[Step] = []
        self.models: list[dict[str, Any]] = []
        self.notes: list[str] = []
        if overrides.limit:
            self.notes.append(
                f"--limit {overrides.limit}: {overrides.limit} documents a task, problems a bench and steps a "
                "fine-tuning, one repeat a benchmark; this shows that the study runs, not how good a model is."
            )

    def measure(
        self, label: str, model: str, evaluate: str, solve: str, *, needs: tuple[Path, ...] = (), only: str = ""
    ) -> None:
        for verb, stage, settings in (
            ("evaluate", evaluate, self.recipe.evaluate),
            ("solve", solve, self.recipe.solve),
        ):
            if settings is not None and only in ("", verb):
                record = self.out / verb / f"{_file(label)}.json"
                limit = {"limit": self.overrides.limit} if self.overrides.limit else {}
                values = {**settings, "model": model, "label": label, "out": record, **limit}
                self._add(stage, verb, label, values, record, needs)

    def tune(self, entry: ModelEntry, variant: Variant) -> _Tuned:
        label = f"{entry.label}+{variant.label}"
        folder = self.out / "finetune" / _file(label)
        values = {"check": 0, **variant.settings, "model": entry.source, "out": folder}  # the study measures itself
        if self.overrides.data_dir is not None and variant.data_offline:
            note = (
                f"Fine-tuning {variant.label} uses {variant.data_offline} of the local data folder instead of "
                f"{variant.settings['data']} (data_offline of the recipe)."
            )
            if note not in self.notes:
                self.notes.append(note)
            values["data"] = variant.data_offline
        if self.overrides.limit:
            values["max_steps"] = self.overrides.limit
        self._add("finetune", "finetune", label, values, folder / RECORD, ())
        if values.get("method") == "full":
            return _Tuned(label, folder, folder / "model", folder / RECORD, merged=False)
        merged = self.out / "merge" / _file(label)
        return _Tuned(label, folder, merged, merged / RECORD, merged=True)

    def merge(self, run: _Tuned) -> None:
        if run.merged:
            values = {**self.recipe.merge, "adapter": run.folder / "adapter", "out": run.model}
            self._add("merge", "merge", run.label, values, run.made_by, (run.folder / RECORD,))

    def check(self, entry: ModelEntry, run: _Tuned) -> None:
        if self.recipe.solve is None or not run.merged:
            return
        label = f"{run.label} (attached)"
        record = self.out / "check" / f"{_file(run.label)}.json"
        values = {
            **self.recipe.solve, "model": entry.source, "adapter": run.folder / "adapter", "label": label,
            "out": record, **({"limit": self.overrides.limit} if self.overrides.limit else {}),
        }  # fmt: skip
        self._add("check", "solve", label, values, record, (run.folder / RECORD,))
        self.models.append({"label": label, "role": "check", "base": run.label, "group": ""})

    def bench(self) -> None:
        if self.recipe.generation is not None:
            for entry in self.recipe.models:
                self.generation(entry, self.recipe.generation)
        for place, settings in enumerate(self.recipe.bench, start=1):
            what = settings.get("what", "bench")
            name = f"{place}-{what}"
            record = self.out / "bench" / f"{name}.json"
            short = {"eval": {"documents": self.overrides.limit}, "scan": {}}.get(what, {"repeats": 1})
            few = short if self.overrides.limit else {}
            self._add("bench", "bench", name, {**settings, "out": record, **few}, record, ())

    def generation(self, entry: ModelEntry, settings: dict[str, Any]) -> None:
        record = self.out / "generation" / f"{_file(entry.label)}.json"
        few = {"limit": min(self.overrides.limit, 2), "repeats": 1} if self.overrides.limit else {}
        values = {**settings, "model": entry.source, "label": entry.label, "out": record, **few}
        self._add("bench", "bench generation", entry.label, values, record, ())

    def _add(
        self, stage: str, verb: str, label: str, values: dict[str, Any], record: Path, needs: tuple[Path, ...]
    ) -> None:
        config_class = self.configs[verb]
        hints = typing.get_type_hints(config_class)
        if self.overrides.data_dir is not None and "data_dir" in hints:
            values.setdefault("data_dir", self.overrides.data_dir)
        if self.overrides.device and "device" in hints:
            values["device"] = self.overrides.device
        texts = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        where = f"recipe {self.recipe.name}: {verb} of {label}"
        checked = from_mapping(texts, hints, where)
        missing = [f.name for f in dataclasses.fields(config_class) if _required(f) and f.name not in checked]
        if missing:
            raise UserError(f"{where}: missing key {', '.join(map(repr, missing))}")
        config = config_class(**checked)
        check(config, where=where)
        other = next((step.label for step in self.steps if step.record == record and step.verb == verb), None)
        if other is not None:
            raise UserError(f"{where}: {record} would be that of {other} too; choose labels that differ as file names")
        self.steps.append(Step(stage, verb, label, config, record, needs))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _file(label: str) -> str:
    """Return a label as a file name."""
    return "".join(letter if letter.isalnum() or letter in "+-._" else "-" for letter in label).strip("-")


def command_line(verb: str, config: Any) -> str:
    """Return the command line that gives ``config``: the flags that differ from their defaults."""
    words, flags = ["mambacus", *verb.split()], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _required(field) and value == field.default:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if field.metadata.get("positional"):
            words += [str(part) for part in value] if isinstance(value, tuple) else [text]
        elif isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{field.name.replace('_', '-')}")
        else:
            flags += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join([*words, *flags])


def settings_of(values: Mapping[str, Any], out: str) -> dict[str, Any]:
    """Return the settings that decide a step's result as JSON values; paths below ``out`` no longer depend on it."""
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key not in _VOLATILE}, default=str))
    return {key: _relative(value, out) for key, value in plain.items()}


def _relative(value: Any, out: str) -> Any:
    if isinstance(value, list):
        return [_relative(part, out) for part in value]
    if isinstance(value, str) and value.startswith(out.rstrip("/") + "/"):
        return "OUT/" + value[len(out.rstrip("/")) + 1 :]
    return value
