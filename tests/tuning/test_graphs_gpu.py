"""Training from CUDA graphs equals training without: ``pytest -m gpu tests/tuning``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambacus.models import MambaLM
from mambacus.tuning.data import Sample
from mambacus.tuning.methods import METHODS, AdapterSettings
from mambacus.tuning.packing import PlannedBatches, plan
from mambacus.tuning.pretraining import Mixture, Plan, Pretraining
from mambacus.tuning.trainer import Settings, train

pytestmark = pytest.mark.gpu
STEPS = 8


def equal_samples(length: int, count: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    return [Sample(draw.integers(2, 250, length).astype(np.int32), trained_from=length // 2) for _ in range(count)]


def finetuned(
    make_model: Callable[..., MambaLM], settings: Settings, data: list[Sample], method: str, graph: str, **changes: Any
) -> dict[str, Any]:
    adapter = changes.pop("adapter", AdapterSettings())
    here = dataclasses.replace(
        settings, folder=settings.folder / graph, device=torch.device("cuda"), cuda_graph=graph, learning_rate=1e-3,
        **changes,
    )  # fmt: skip
    layout = plan(
        [*map(len, data)], epochs=1, max_steps=STEPS, batch_size=4, grad_accum=here.grad_accum, capacity=128, seed=0
    )
    chosen = METHODS[method]
    torch.manual_seed(0)
    model = chosen.attach(make_model().cuda(), adapter)
    return train(model, PlannedBatches(data, layout), here, quiet_first=chosen.quiet_first)


def hold(plain: dict[str, Any], recorded: dict[str, Any], bound: float) -> None:
    assert not plain["cuda_graph"]["used"] and recorded["cuda_graph"]["repeated"] >= 4
    for one, other in zip(plain["history"], recorded["history"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=bound), one["step"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * bound), one["step"]


@pytest.mark.parametrize(("autocast", "bound"), [(None, 1e-4), (torch.bfloat16, 2e-3)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "grad_accum"), [("full", 1), ("full", 2), ("lora", 1), ("lora", 2)])
def test_finetuning(
    make_model: Callable[..., MambaLM], settings: Settings, samples: list[Sample], method: str, grad_accum: int,
    autocast: Any, bound: float,
) -> None:  # fmt: skip
    options = {"grad_accum": grad_accum, "autocast": autocast, "adapter": AdapterSettings(dropout=0.0)}
    results = [finetuned(make_model, settings, samples, method, graph, **options) for graph in ("off", "on")]
    hold(results[0], results[1], bound)


def test_dropout_draws_what_it_draws_without(make_model: Callable[..., MambaLM], settings: Settings) -> None:
    data, adapter = equal_samples(64, 8), AdapterSettings(dropout=0.5)
    results = [finetuned(make_model, settings, data, "lora", graph, adapter=adapter) for graph in ("off", "on")]
    hold(results[0], results[1], 1e-4)


@pytest.mark.parametrize("method", ["lora+", "rslora", "cs5242"])
def test_other_methods_that_are_recorded_unasked(
    make_model: Callable[..., MambaLM], settings: Settings, samples: list[Sample], method: str
) -> None:
    adapter = AdapterSettings(dropout=0.0)
    runs = [finetuned(make_model, settings, samples, method, graph, adapter=adapter) for graph in ("off", "auto")]
    hold(runs[0], runs[1], 1e-4)


def test_pretraining(make_model: Callable[..., MambaLM], tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(0, 250, 5000).astype(np.uint16)
    settings = Plan(
        steps=STEPS, max_minutes=0, batch=4, seqlen=96, learning_rate=1e-3, weight_decay=0.1, warmup=0.1, decay=0.4,
        clip=1.0, weights={"text": 1.0}, seed=0, log_every=1, save_every=100,
    )  # fmt: skip
    losses = []
    for graph in ("off", "on"):
        model = make_model().cuda()
        mixture = Mixture({"text": stream}, settings.weights, settings.seqlen, 0, model.device)
        training = Pretraining(model, mixture, settings, tmp_path, cuda_graph=graph)
        training.run_until(STEPS)
        losses.append([entry["loss"] for entry in training.history])
        facts = training.summary()["cuda_graph"]
        assert facts["used"] == (graph == "on") and (graph == "off" or facts["repeated"] == STEPS - 1)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize(("autocast", "bound"), [(False, 2e-5), (True, 3e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [("in_proj", "out_proj"), ("all-linear",)], ids=str)
def test_lora_has_the_gradients_of_the_cpu(
    make_model: Callable[..., MambaLM], targets: tuple[str, ...], autocast: bool, bound: float
) -> None:
    """The GPU's own product of LoRA, the input of the scan made again and the gradients apart, against torch."""
    torch.manual_seed(0)
    model = METHODS["lora"].attach(make_model(), AdapterSettings(dropout=0.0, targets=targets)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(2, 250, (3, 70))
    seq_idx = (torch.arange(70) // 30).expand(3, -1).int().contiguous()
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and device == "cuda"):
            loss = model(
                input_ids=ids.to(device), seq_idx=seq_idx.to(device), labels=ids.to(device), loss_only=True
            ).loss
        loss.backward()
        found.append({n: p.grad.double().cpu() for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm() / expected.norm()
        assert error < bound, (name, error)
