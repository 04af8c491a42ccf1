"""The audit fires when a trainable tensor takes no part, and the search for a bad number names its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mambacus.models import MambaLM
from mambacus.tuning.audit import TrainingStoppedError, first_bad_module
from mambacus.tuning.data import Sample
from mambacus.tuning.packing import PlannedBatches, plan
from mambacus.tuning.trainer import Settings, train


class Altered(nn.Module):
    """A model with one more trainable tensor, and a say in what its loss depends on."""

    def __init__(self, model: MambaLM, effect: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.extra = nn.Parameter(torch.ones(3))
        self.effect = effect

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        return output._replace(loss=self.effect(output.loss, self.extra))


def run(model: nn.Module, samples: list[Sample], settings: Settings) -> None:
    layout = plan([*map(len, samples)], epochs=1, max_steps=4, batch_size=4, grad_accum=1, capacity=64, seed=0)
    train(model, PlannedBatches(samples, layout), settings)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (lambda loss, extra: loss, "step 1: no gradient reaches extra"),
        (lambda loss, extra: loss + extra.detach().sum(), "step 1: no gradient reaches extra"),
        (lambda loss, extra: loss + 0 * extra.sum(), "step 1: the gradient is zero in extra"),
        (
            lambda loss, extra: loss + (extra - extra.detach()).sqrt().sum(),
            "step 1: the gradient is not finite in extra",
        ),
    ],
    ids=["unused", "cut", "zero", "infinite"],
)
def test_a_tensor_that_takes_no_part_stops_the_run(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, effect: Any, words: str
) -> None:
    with pytest.raises(TrainingStoppedError, match=words):
        run(Altered(make_model(), effect), samples, settings)


def test_a_tensor_cut_out_of_the_model_stops_the_run(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    model = make_model()
    mixer: Any = model.backbone.layers[1].mixer
    mixer.dt_proj.forward = lambda dt: (dt @ mixer.dt_proj.weight.detach().T) + mixer.dt_proj.bias
    with pytest.raises(TrainingStoppedError, match=r"step 1: no gradient reaches .*layers\.1\.mixer\.dt_proj\.weight"):
        run(model, samples, settings)


def test_a_tensor_that_the_optimiser_leaves_out_stops_the_run(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.tuning import trainer

    groups = trainer.parameter_groups
    monkeypatch.setattr(trainer, "parameter_groups", lambda model, decay, rate_of: groups(model, decay)[:1])
    with pytest.raises(TrainingStoppedError, match=r"step 2: two updates did not change .*\.mixer\.A_log.*and 8 more"):
        run(make_model(), samples, settings)


def test_a_sound_model_passes(make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings) -> None:
    run(make_model(), samples, settings)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_module(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    model = make_model()
    calls = 0

    def breaks_at_the_fourth_call(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * (float("nan") if calls >= 4 else 1.0)

    model.backbone.layers[1].mixer.x_proj.register_forward_hook(breaks_at_the_fourth_call)  # type: ignore[union-attr]
    with pytest.raises(TrainingStoppedError, match=r"step 4: the loss is nan.*layers\.1\.mixer\.x_proj.*checkpoint-2"):
        run(model, samples, settings)
    assert (settings.folder / "checkpoints" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("breaks", "place"),
    [
        ("backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.in_proj"),
        ("backbone.layers.1.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"),
        ("backbone.embeddings", "backbone.embeddings"),
        ("lm_head", "lm_head"),
    ],
)
def test_the_first_bad_number_is_found(make_model: Callable[..., MambaLM], breaks: str, place: str) -> None:
    model = make_model(tie_embeddings=False)
    with torch.no_grad():
        model.get_parameter(f"{breaks}.weight")[2:6] = float("inf")
    assert first_bad_module(model, lambda: model(torch.arange(9)[None])) == place


def test_a_bad_number_made_between_modules_is_placed(make_model: Callable[..., MambaLM]) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("backbone.layers.1.mixer.D")[0] = float("nan")
    found = first_bad_module(model, lambda: model(torch.arange(9)[None]))
    assert found == "backbone.layers.1.mixer, before out_proj"


def test_nothing_bad_is_said_so(make_model: Callable[..., MambaLM]) -> None:
    model = make_model()
    assert "no module" in first_bad_module(model, lambda: model(torch.arange(9)[None]))
