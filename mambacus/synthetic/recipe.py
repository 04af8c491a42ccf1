"""The YAML file of a controlled study: tasks, arms, training, and the predictions that are written down first."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypeVar

from mambacus.runtime.config import check, from_mapping, opt
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.yaml_files import list_of, mapping_of, names_in, read_named
from mambacus.synthetic.tasks import Task, make_task

PACKAGED = resources.files("mambacus") / "recipes" / "controlled"
EXPECTATIONS = ("mamba_lower", "mamba_higher", "open")
_KEYS = ("title", "question", "sources", "arms", "training", "tasks", "predictions")
PartT = TypeVar("PartT")


@dataclasses.dataclass(frozen=True)
class ArmSettings:
    """Sizes that `mambacus.synthetic.arms` solves for."""

    parameters: int = opt(help="parameters without embeddings, of every arm", least=1000)
    mamba_layers: int = opt(help="Mamba blocks", least=1)
    transformer_layers: int = opt(help="Transformer layers", least=1)
    head_dim: int = opt(32, "width of an attention head", least=2)
    d_state: tuple[int, ...] = opt((16,), "one Mamba arm for each of these states a channel", least=1)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How every run is trained; a task may have its own ``steps``, ``batch`` and ``train_rows``."""

    steps: int = opt(help="optimiser steps", least=1)
    batch: int = opt(help="rows of a step of the longest; all steps have as many tokens", least=1)
    learning_rates: tuple[float, ...] = opt(help="peak rates tried for every arm", above=0)
    seeds: int = opt(3, "runs at the chosen rate", least=1, most=100)
    train_rows: int = opt(0, "different training rows, equally many of each difficulty (0: each seen once)", least=0)
    warmup: float = opt(0.05, "share of the steps in which the rate rises", least=0, below=1)
    weight_decay: float = opt(0.1, "AdamW's, on matrices only", least=0)
    clip: float = opt(1.0, "largest norm of the gradient", above=0)
    valid_rows: int = opt(512, "rows that the rate is chosen on", least=1)
    test_rows: int = opt(512, "rows of the test at each difficulty", least=1)


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """One task of a study.

    Attributes:
        name: in records and reports.
        task: draws the rows.
        train_x: difficulties of the training rows, in equal shares.
        test_x: difficulties tested; larger ones than trained measure generalisation.
        training: the study's settings with the task's own in their places.
    """

    name: str
    task: Task
    train_x: tuple[int, ...]
    test_x: tuple[int, ...]
    training: TrainingSettings


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is expected of a Mamba arm's mean accuracy over ``x``, against another arm's.

    Attributes:
        task: name of a task.
        text: the expectation in words.
        expects: one of `EXPECTATIONS`.
        x: difficulties that it is judged on; all tested ones if left out.
        d_state: the Mamba arm; may be left out where there is one.
        against_task: task of the other side; the same if left out.
        against_d_state: another Mamba arm as the other side; the Transformer if left out.
    """

    task: str
    text: str
    expects: str
    x: tuple[int, ...] = ()
    d_state: int | None = None
    against_task: str = ""
    against_d_state: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A controlled study.

    Attributes:
        name: the file's stem.
        title: heading of the report.
        question: what is asked, in a sentence or two.
        sources: the literature that predictions rest on.
        arms: sizes.
        tasks: at least one.
        predictions: at least one.
        loaded: the file's content, which runs and records are tied to.
    """

    name: str
    title: str
    question: str
    sources: tuple[str, ...]
    arms: ArmSettings
    tasks: tuple[TaskEntry, ...]
    predictions: tuple[Prediction, ...]
    loaded: Mapping[str, Any]

    def entry(self, name: str) -> TaskEntry:
        """Return the task of this name."""
        return next(entry for entry in self.tasks if entry.name == name)


def packaged_recipes() -> list[str]:
    """Return the names of the controlled studies that ship with the package."""
    return names_in(PACKAGED)


def read_recipe(name: str) -> Recipe:
    """Read a recipe file, or a packaged recipe by its bare name (``mqar``).

    Raises:
        UserError: no such file or recipe, not YAML, or an unknown, missing or impossible value.
    """
    stem, loaded = read_named(name, PACKAGED, "recipe")
    return make_recipe(stem, loaded, f"recipe {name}")


def make_recipe(stem: str, loaded: dict[str, Any], where: str) -> Recipe:
    """Return the recipe that a YAML file's content stands for.

    Raises:
        UserError: as `read_recipe`.
    """
    for key in loaded:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), _KEYS)}")
    missing = [key for key in _KEYS if not loaded.get(key)]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    arms = _part(ArmSettings, loaded["arms"], f"{where}: arms")
    repeated = sorted({value for value in arms.d_state if arms.d_state.count(value) > 1})
    if repeated:
        raise UserError(f"{where}: arms: d_state {repeated[0]} is given more than once")
    training = _part(TrainingSettings, loaded["training"], f"{where}: training")
    tasks = tuple(
        _task(row, training, f"{where}: tasks[{place}]") for place, row in enumerate(list_of(loaded, "tasks", where))
    )
    names = [entry.name for entry in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: tasks: expected different names, got {', '.join(names)}")
    about = from_mapping(
        {key: loaded[key] for key in ("title", "question", "sources")},
        {"title": str, "question": str, "sources": tuple[str, ...]},
        where,
    )
    question = " ".join(about["question"].split())
    recipe = Recipe(stem, about["title"], question, about["sources"], arms, tasks, (), loaded)
    predictions = tuple(
        _prediction(row, recipe, f"{where}: predictions[{place}]")
        for place, row in enumerate(list_of(loaded, "predictions", where))
    )
    return dataclasses.replace(recipe, predictions=predictions)


def _task(row: Any, training: TrainingSettings, where: str) -> TaskEntry:
    values = dict(mapping_of(row, where))
    own: dict[str, Any] = {key: values.pop(key) for key in ("steps", "batch", "train_rows") if key in values}
    settings = mapping_of(values.pop("settings", {}), f"{where}: settings")
    hints = {"name": str, "kind": str, "train_x": tuple[int, ...], "test_x": tuple[int, ...]}
    read = from_mapping(values, hints, where)
    missing = [key for key in hints if not read.get(key)]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    task = make_task(read["kind"], settings, where)
    for key in ("train_x", "test_x"):
        for x in read[key]:
            if not task.least_x <= x <= task.most_x:
                raise UserError(f"{where}: {key}: expected {task.x_name} from {task.least_x} to {task.most_x}, got {x}")
    merged = dataclasses.replace(training, **from_mapping(own, typing.get_type_hints(TrainingSettings), where))
    check(merged, where=where)
    return TaskEntry(read["name"], task, read["train_x"], read["test_x"], merged)


def _prediction(row: Any, recipe: Recipe, where: str) -> Prediction:
    """Read one prediction and fill in what it leaves out."""
    given = _part(Prediction, row, where)
    names = [entry.name for entry in recipe.tasks]
    for task in (given.task, given.against_task or given.task):
        if task not in names:
            raise UserError(f"{where}: task: expected one of {', '.join(names)}, got {task!r}{suggest(task, names)}")
    if given.expects not in EXPECTATIONS:
        raise UserError(f"{where}: expects: expected one of {', '.join(EXPECTATIONS)}, got {given.expects!r}")
    states = recipe.arms.d_state
    if given.d_state is None and len(states) > 1:
        raise UserError(f"{where}: missing d_state: the study has Mamba arms with {', '.join(map(str, states))}")
    for state in (given.d_state, given.against_d_state):
        if state is not None and state not in states:
            raise UserError(f"{where}: d_state: expected one of {', '.join(map(str, states))}, got {state}")
    full = dataclasses.replace(
        given,
        x=given.x or recipe.entry(given.task).test_x,
        d_state=given.d_state or states[0],
        against_task=given.against_task or given.task,
    )
    for task in (full.task, full.against_task):
        tested = recipe.entry(task).test_x
        absent = [x for x in full.x if x not in tested]
        if absent:
            raise UserError(f"{where}: x: {task} is tested at {', '.join(map(str, tested))}, not at {absent[0]}")
    if (full.task, full.d_state) == (full.against_task, full.against_d_state):
        raise UserError(f"{where}: compares an arm with itself")
    return full


def _part(kind: type[PartT], value: Any, where: str) -> PartT:
    """Return a dataclass from its mapping.

    Raises:
        UserError: unknown or missing key, or a value of the wrong type or range.
    """
    read = from_mapping(mapping_of(value, where), typing.get_type_hints(kind), where)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [field.name for field in fields if field.name not in read and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    made = kind(**read)
    check(made, where=where)
    return made
