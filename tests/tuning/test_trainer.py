"""The loop: it learns, splits steps exactly, groups parameters, and a run cut at any step ends as if it were whole."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError
from mambacus.tuning import trainer as trainer_module
from mambacus.tuning.data import Sample
from mambacus.tuning.methods import METHODS, AdapterSettings
from mambacus.tuning.optimiser import parameter_groups, rate_factor
from mambacus.tuning.packing import PlannedBatches, plan
from mambacus.tuning.trainer import Settings, choose_autocast, train

CPU = torch.device("cpu")
LORA = METHODS["lora"]
attach_lora, attach_full = LORA.attach, METHODS["full"].attach


def batches(samples: list[Sample], steps: int, batch_size: int = 4, grad_accum: int = 1) -> PlannedBatches:
    layout = plan(
        [*map(len, samples)],
        epochs=1,
        max_steps=steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        capacity=64,
        seed=0,
    )
    return PlannedBatches(samples, layout)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("method", "rate", "steps"), [("full", 1e-2, 100), ("lora", 3e-2, 120)])
def test_eight_samples_are_learnt_by_heart(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, method: str, rate: float, steps: int
) -> None:
    chosen = METHODS[method]
    targets = ("in_proj", "x_proj", "dt_proj", "out_proj", "lm_head") if method == "lora" else ()
    torch.manual_seed(0)
    model = chosen.attach(make_model(), AdapterSettings(dropout=0.0, targets=targets))
    settings = dataclasses.replace(settings, learning_rate=rate, save_every=1000)
    results = train(model, batches(samples, steps, batch_size=8), settings, quiet_first=chosen.quiet_first)
    assert results["train"]["loss_first"] > 3
    assert results["train"]["loss_last"] < 0.3
    assert len(results["history"]) == results["train"]["steps"] == steps
    assert results["train"]["tokens"] == steps * sum(map(len, samples))


def test_a_split_step_gives_the_same_training(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    results = []
    for parts in (1, 4):
        model = attach_full(make_model(), AdapterSettings())
        here = dataclasses.replace(settings, grad_accum=parts, learning_rate=1e-3, folder=settings.folder / str(parts))
        history = train(model, batches(samples, 5, batch_size=8, grad_accum=parts), here)["history"]
        results.append((history, trained_tensors(model)))
    (whole_history, whole), (split_history, split) = results
    for one, other in zip(whole_history, split_history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    start = make_model()
    for name, tensor in whole.items():
        moved = (tensor - start.get_parameter(name)).norm()
        assert (tensor - split[name]).norm() <= 1e-2 * moved, name


class CutError(Exception):
    """Stands for the end of the process."""


class CutAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise CutError


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_run_cut_at_any_step_and_resumed_ends_bit_for_bit_the_same(
    make_model: Callable[..., MambaLM],
    samples: list[Sample],
    settings: Settings,
    grad_accum: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = 6
    progress = trainer_module.Progress

    def run(name: str, *, cut: int | None = None, resume: bool = False) -> dict[str, Any]:
        torch.manual_seed(0)
        model = attach_lora(make_model(), AdapterSettings(dropout=0.3))
        here = dataclasses.replace(settings, folder=settings.folder / name, grad_accum=grad_accum, seed=5)
        with monkeypatch.context() as patch:
            if cut:
                patch.setattr(trainer_module, "Progress", lambda data: CutAt(cut))
            data = batches(samples, steps, grad_accum=grad_accum)
            results = train(model, data, here, quiet_first=LORA.quiet_first, resume=resume)
        return results | {"tensors": trained_tensors(model)}

    assert trainer_module.Progress is progress
    expected = run("whole")
    for cut in range(1, steps + 1):
        with pytest.raises(CutError):
            run(f"cut{cut}", cut=cut)
        resumed = run(f"cut{cut}", resume=True)
        last_saved = (cut - 1) // settings.save_every * settings.save_every
        assert resumed["train"]["resumed_from_step"] == (last_saved or None)
        assert resumed["history"] == expected["history"]
        for name, tensor in expected["tensors"].items():
            assert torch.equal(resumed["tensors"][name], tensor), f"cut at {cut}: {name}"


def test_resuming_a_finished_run_changes_nothing(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    model = attach_full(make_model(), AdapterSettings())
    first = train(model, batches(samples, 3), settings)
    expected = trained_tensors(model)
    again = attach_full(make_model(), AdapterSettings())
    second = train(again, batches(samples, 3), settings, resume=True)
    assert second["history"] == first["history"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(again).items())


def test_a_checkpoint_of_other_tensors_is_refused(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    train(attach_full(make_model(), AdapterSettings()), batches(samples, 2), settings)
    other = attach_lora(make_model(), AdapterSettings())
    with pytest.raises(UserError, match="holds other tensors"):
        train(other, batches(samples, 4), settings, quiet_first=LORA.quiet_first, resume=True)


def test_only_trained_tensors_are_checkpointed(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    from safetensors.torch import load_file

    model = attach_lora(make_model(), AdapterSettings())
    train(model, batches(samples, 2), settings, quiet_first=LORA.quiet_first)
    stored = load_file(settings.folder / "checkpoints" / "checkpoint-2" / "trainable.safetensors")
    assert stored.keys() == trained_tensors(model).keys()


def test_what_is_frozen_stays_bit_for_bit(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    model: Any = attach_lora(make_model(), AdapterSettings())
    train(model, batches(samples, 3), settings, quiet_first=LORA.quiet_first)
    plain = model.unload()
    for name, parameter in make_model().named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name


def test_rates_norms_and_biases_have_no_decay(make_model: Callable[..., MambaLM]) -> None:
    model = attach_full(make_model(use_bias=True, tie_embeddings=False), AdapterSettings())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    kinds = [
        {re.sub(r"backbone\.layers\.\d\.(mixer\.)?", "", names[id(p)]) for p in g["params"]} for g in (decayed, spared)
    ]
    projections = {f"{part}.weight" for part in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")}
    assert kinds[0] == {*projections, "backbone.embeddings.weight", "lm_head.weight"}
    biases = {f"{part}.bias" for part in ("in_proj", "dt_proj", "out_proj", "conv1d")}
    assert kinds[1] == {*biases, "A_log", "D", "norm.weight", "backbone.norm_f.weight"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_frozen_tensors_are_in_no_group(make_model: Callable[..., MambaLM]) -> None:
    model = attach_lora(make_model(), AdapterSettings())
    (only,) = parameter_groups(model, 0.1)
    assert len(only["params"]) == len(trained_tensors(model))


def test_the_rate_rises_from_above_zero_and_ends_near_zero() -> None:
    factors = [rate_factor(step, total=100, warmup=3) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[51] == pytest.approx(0.5, abs=0.02)
    assert 0 < factors[-1] < 0.001
    assert rate_factor(0, total=1, warmup=1) == 1.0


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"float16: refused; .* leave its range"):
        choose_autocast("float16", CPU)


def test_bfloat16_only_where_there_is_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "has_bfloat16", lambda device: False)
    assert choose_autocast("auto", CPU) is None
    with pytest.raises(UserError, match="no bfloat16 arithmetic"):
        choose_autocast("bfloat16", CPU)
    monkeypatch.setattr(trainer_module, "has_bfloat16", lambda device: True)
    assert choose_autocast("auto", CPU) is torch.bfloat16
    assert choose_autocast("float32", CPU) is None
    with pytest.raises(UserError, match="expected auto, float32 or bfloat16"):
        choose_autocast("int8", CPU)


def test_master_weights_are_float32(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    with pytest.raises(TypeError, match="master weights are float32"):
        train(attach_full(make_model().to(torch.bfloat16), AdapterSettings()), batches(samples, 1), settings)


def test_autocast_keeps_masters_and_learns(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    model = attach_full(make_model(), AdapterSettings())
    settings = dataclasses.replace(settings, autocast=torch.bfloat16)
    results = train(model, batches(samples, 10, batch_size=8), settings)
    assert results["train"]["loss_last"] < results["train"]["loss_first"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_another_gpu_than_the_first_is_refused(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    settings = dataclasses.replace(settings, device=torch.device("cuda:1"))
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        train(make_model(), batches(samples, 1), settings)


def test_the_log_can_be_read_by_tensorboard(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = train(attach_full(make_model(), AdapterSettings()), batches(samples, 3), settings)
    log = EventAccumulator(str(settings.folder / "tensorboard"))
    log.Reload()
    logged = [event.value for event in log.Scalars("train/loss")]
    assert logged == pytest.approx([entry["loss"] for entry in results["history"]], rel=1e-6)
    assert all(math.isfinite(value) for value in logged)
