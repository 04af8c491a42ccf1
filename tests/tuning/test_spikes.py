"""A loss that leaps and stays up stops the run; noise, single odd batches and the committed curves do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambacus.models import MambaLM
from mambacus.tuning.audit import TrainingStoppedError
from mambacus.tuning.data import Sample
from mambacus.tuning.packing import PlannedBatches, plan
from mambacus.tuning.spikes import ENOUGH, PATIENCE, GradientWatch, LossWatch
from mambacus.tuning.trainer import Settings, train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def stopped_at(losses: Iterable[float], watch: LossWatch | None = None) -> int | None:
    watch = watch or LossWatch()
    return next((step for step, loss in enumerate(losses, 1) if watch.see(loss)), None)


def test_a_loss_that_stays_up_stops_the_run() -> None:
    assert stopped_at([1.0] * 20 + [2.5] * 9) == 20 + PATIENCE
    assert stopped_at([1.0] * 20 + ([2.5] * (PATIENCE - 1) + [1.0]) * 9) is None
    assert stopped_at([1.0] * 20 + [1.9] * 9) is None
    assert stopped_at([1.0] * 4 + [9.0] * (ENOUGH - 4) + [1.0] * 9) is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_noise_of_batches_of_one_stops_nothing(scale: float) -> None:
    """Losses spread over decades, as those of single short answers are."""
    random = np.random.default_rng(0)
    assert stopped_at((scale * random.lognormal(0, 1.2, 5_000)).tolist()) is None


def test_committed_curves_stop_nowhere_and_stop_when_they_leap() -> None:
    curves = [
        [entry["loss"] for entry in json.loads(path.read_text())["results"]["history"]]
        for path in BENCHMARKS.glob("*/finetune/*/record.json")
    ]
    assert curves
    for curve in curves:
        assert stopped_at(curve) is None
        assert stopped_at(curve[:60] + [loss + 2 for loss in curve[60:]]) == 60 + PATIENCE


def test_a_resumed_watch_judges_as_one_that_was_not_interrupted() -> None:
    first = LossWatch()
    stopped_at([1.0] * 20, first)
    assert stopped_at([3.0] * 9, LossWatch([*first.usual])) == PATIENCE


def test_the_gradient_whose_share_grew_most_is_found() -> None:
    watch = GradientWatch()
    assert watch.grown() is None
    for _ in range(3):
        watch.see(torch.tensor([1.0, 0.1, 0.5]), 0)
    watch.see(torch.tensor([0.9, 0.4, 0.1]), 1)
    watch.see(torch.tensor([0.0, 0.0, 9.0]), 2)  # what follows is a consequence
    assert watch.grown() == 1


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_spike_stops_the_run_names_a_tensor_and_keeps_the_checkpoint_before(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, grad_accum: int
) -> None:
    model = make_model()
    calls = 0

    def leaps(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output[0] * (50.0 if calls > 14 * grad_accum else 1.0), *output[1:])

    model.backbone.norm_f.register_forward_hook(leaps)
    layout = plan(
        [*map(len, samples)], epochs=1, max_steps=40, batch_size=4, grad_accum=grad_accum, capacity=64, seed=0
    )
    settings = dataclasses.replace(settings, learning_rate=1e-5, grad_accum=grad_accum, save_every=1)
    with pytest.raises(TrainingStoppedError) as error:
        train(model, PlannedBatches(samples, layout), settings)
    said = str(error.value)
    assert said.startswith("step 22: the loss is ") and "since step 15" in said
    assert "grew most at step 15 is backbone." in said
    assert f"{settings.folder / 'checkpoints' / 'checkpoint-13'} is kept" in said
    kept = sorted(path.name for path in (settings.folder / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-13", "checkpoint-14"]


def test_a_checkpoint_put_off_is_written_when_the_loss_is_back_and_off_is_off(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    layout = plan([*map(len, samples)], epochs=1, max_steps=22, batch_size=4, grad_accum=1, capacity=64, seed=0)

    def run(name: str, last: int, spike_stop: bool) -> list[str]:
        model = make_model()
        calls = 0

        def leaps(module: Any, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return (output[0] * (50.0 if 14 < calls <= last else 1.0), *output[1:])

        model.backbone.norm_f.register_forward_hook(leaps)
        here = dataclasses.replace(
            settings, folder=settings.folder / name, learning_rate=1e-5, save_every=16, spike_stop=spike_stop
        )
        train(model, PlannedBatches(samples, layout), here)
        return sorted(path.name for path in (here.folder / "checkpoints").glob("checkpoint-*"))

    assert run("short", 17, True) == ["checkpoint-18", "checkpoint-22"]
    assert run("off", 40, False) == ["checkpoint-16", "checkpoint-22"]
