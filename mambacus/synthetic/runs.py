"""The runs of a controlled study: which there are, in which order, and how one is carried out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mambacus.runtime.errors import UserError
from mambacus.runtime.graphs import CudaRecorder
from mambacus.synthetic.arms import Arm, build, size_mamba, size_transformer
from mambacus.synthetic.examples import Examples, held_out, mixed_rows, training_sets
from mambacus.synthetic.recipe import ArmSettings, Recipe, TaskEntry
from mambacus.synthetic.tasks import IGNORE
from mambacus.synthetic.training import Plan, rows_of_step, score, train

DATA_SEED = 0  # of all rows: seeds of runs decide weights and order
TUNING_SEED = 1000  # of the runs that choose a rate, so that no seed that is reported has chosen it


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one arm.

    Attributes:
        task: name of the task.
        arm: which model.
        learning_rate: peak.
        seed: of weights and order.
        tuning: it helps to choose the rate; its model never sees the test.
    """

    task: str
    arm: Arm
    learning_rate: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """Name of the run's file, different for every run of a study."""
        purpose = "tuning" if self.tuning else f"seed{self.seed}"
        return f"{self.task}_{self.arm.key}_lr{self.learning_rate:g}_{purpose}"


def arms_of(settings: ArmSettings) -> tuple[Arm, ...]:
    """Return the Transformer and the Mamba arms of a study, equally large.

    Raises:
        UserError: a size cannot be met.
    """
    transformer = size_transformer(settings.parameters, settings.transformer_layers, settings.head_dim)
    mambas = [size_mamba(settings.parameters, settings.mamba_layers, state) for state in settings.d_state]
    return (transformer, *mambas)


def tuning_runs(entry: TaskEntry, arms: Sequence[Arm]) -> Iterator[Run]:
    """Yield the runs that try each rate on each arm."""
    for arm in arms:
        for rate in entry.training.learning_rates:
            yield Run(entry.name, arm, rate, TUNING_SEED, True)


def seed_runs(entry: TaskEntry, arms: Sequence[Arm], tuned: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """Yield the runs that are reported, at the rate of the smallest validation loss among the results ``tuned``.

    Raises:
        UserError: every rate of an arm diverged.
    """
    rates = {arm.key: best_rate([one for one in tuned if one["key"] == arm.key]) for arm in arms}
    for seed in range(entry.training.seeds):
        for arm in arms:
            yield Run(entry.name, arm, rates[arm.key], seed, False)


def best_rate(tried: Sequence[dict[str, Any]]) -> float:
    """Return the rate of the smallest validation loss.

    Raises:
        UserError: no run has a finite one.
    """
    finite = [one for one in tried if not one["diverged"]]
    if not finite:
        rates = ", ".join(f"{one['learning_rate']:g}" for one in tried)
        raise UserError(f"task {tried[0]['task']}, {tried[0]['key']}: every rate diverged ({rates}); add smaller ones")
    return float(min(finite, key=lambda one: one["valid_loss"])["learning_rate"])


def count_runs(recipe: Recipe, arms: Sequence[Arm]) -> int:
    """Return how many trainings the study is."""
    return sum(len(arms) * (len(e.training.learning_rates) + e.training.seeds) for e in recipe.tasks)


def seqlen_of(entry: TaskEntry) -> int:
    """Return the tokens of the longest training row."""
    return max(entry.task.length(x) for x in entry.train_x)


def mean_seqlen(entry: TaskEntry) -> float:
    """Return the mean tokens of a training row over the difficulties, which have equally many steps."""
    return float(np.mean([entry.task.length(x) for x in entry.train_x]))


def tokens_of_step(entry: TaskEntry) -> int:
    """Return the tokens of a step, whatever the difficulty of its rows."""
    return entry.training.batch * seqlen_of(entry)


def scored_share(entry: TaskEntry) -> float:
    """Return which share of the training tokens is scored, from 64 rows a difficulty."""
    rng = np.random.default_rng(DATA_SEED)
    return float(np.mean([(entry.task.draw(rng, 64, x)[1] != IGNORE).mean() for x in entry.train_x]))


def limited(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with no more than ``steps`` steps a run; 0 for no limit."""
    if not steps:
        return recipe
    tasks = [
        dataclasses.replace(e, training=dataclasses.replace(e.training, steps=min(steps, e.training.steps)))
        for e in recipe.tasks
    ]
    return dataclasses.replace(recipe, tasks=tuple(tasks))


class Laboratory:
    """Carries out runs on a device; holds the rows of one task at a time, which all its runs share.

    Args:
        recipe: the study.
        device: where models and rows lie.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self._training = functools.lru_cache(maxsize=1)(self._draw_training)
        self._valid = functools.lru_cache(maxsize=1)(self._draw_valid)
        self._tests = functools.lru_cache(maxsize=1)(self._draw_tests)

    def _draw_training(self, task: str) -> tuple[Examples, ...]:
        entry = self.recipe.entry(task)
        parts, tokens = len(entry.train_x), tokens_of_step(entry)
        steps = -(-entry.training.steps // parts)
        rows = [
            entry.training.train_rows // parts or steps * rows_of_step(tokens, entry.task.length(x))
            for x in entry.train_x
        ]
        sets = training_sets(entry.task, rows, entry.train_x, DATA_SEED)
        return tuple(one.to(self.device) for one in sets)

    def _draw_valid(self, task: str) -> Examples:
        entry = self.recipe.entry(task)
        return mixed_rows(entry.task, "valid", entry.training.valid_rows, entry.train_x, DATA_SEED).to(self.device)

    def _draw_tests(self, task: str) -> dict[int, Examples]:
        entry = self.recipe.entry(task)
        return {
            x: held_out(entry.task, "test", entry.training.test_rows, x, DATA_SEED).to(self.device)
            for x in entry.test_x
        }

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train and score one run.

        Returns:
            What the record keeps of it: who, sizes, tokens, seconds, loss curve, and ``valid_loss`` with
            ``valid_accuracy`` of a tuning run or ``test`` (accuracy at each ``x``) of another.

        Raises:
            UserError: the task has too few different problems.
        """
        entry = self.recipe.entry(run.task)
        settings = entry.training
        longest = max(entry.task.length(x) for x in (*entry.train_x, *entry.test_x))
        learner = build(run.arm, entry.task.vocab_size, longest, run.seed)
        plan = Plan(
            settings.steps, tokens_of_step(entry), run.learning_rate, run.seed, settings.warmup, settings.weight_decay,
            settings.clip,
        )  # fmt: skip
        recorder = CudaRecorder(self.device) if self.device.type == "cuda" else None
        outcome = train(learner, self._training(run.task), plan, recorder)
        found = {
            "task": run.task,
            "arm": run.arm.name,
            "key": run.arm.key,
            "d_state": run.arm.d_state,
            "layers": run.arm.layers,
            "width": run.arm.width,
            "parameters": run.arm.parameters,
            "parameters_embedded": sum(parameter.numel() for parameter in learner.parameters()),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "tuning": run.tuning,
            "steps": plan.steps,
            "train_tokens": outcome.tokens,
            "seconds": round(outcome.seconds, 2),
            "curve": outcome.curve,
            "diverged": not math.isfinite(outcome.curve[-1][1]),
        }
        if run.tuning:
            valid = score(learner, self._valid(run.task))
            diverged = found["diverged"] or not math.isfinite(valid["loss"])
            return found | {
                "valid_loss": valid["loss"], "valid_accuracy": valid["accuracy"], "diverged": diverged,
            }  # fmt: skip
        tests = self._tests(run.task)
        return found | {
            "test": [
                {
                    "x": x,
                    "memory_numbers": run.arm.memory_numbers(entry.task.length(x)),
                    **score(learner, rows),
                }
                for x, rows in tests.items()
            ]
        }
