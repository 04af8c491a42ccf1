"""Recorded passes: memory of inputs and gradients, shapes, and when they are chosen; graphs themselves need a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError
from mambacus.tuning import graphs, processes
from mambacus.tuning import trainer as trainer_module
from mambacus.tuning.audit import trainable
from mambacus.tuning.data import Sample
from mambacus.tuning.methods import METHODS, AdapterSettings
from mambacus.tuning.packing import PADDING_VALUES, PlannedBatches, collate, plan
from mambacus.tuning.trainer import Settings, train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeRecorder:
    """Repeats a pass by running it again from the memory it was recorded with, as a graph would."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.warmed = 0

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        assert all(parameter.grad is None for parameter in self.parameters)
        self.warmed += 1
        run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in self.parameters]
        loss = run().clone()
        memory = [parameter.grad for parameter in self.parameters]
        adds = before[0] is not None
        for tensor, was in zip(memory, before, strict=True):
            assert (was is not None) == adds and (was is None or was[0] is tensor)
            tensor.copy_(was[1] if was else torch.full_like(tensor, torch.nan))  # recording does not carry out
        loss.fill_(torch.nan)

        def replay() -> None:
            for parameter, tensor in zip(self.parameters, memory, strict=True):
                parameter.grad = tensor if adds else None
            loss.copy_(run())
            for parameter, tensor in zip(self.parameters, memory, strict=True):
                if not adds:
                    tensor.copy_(parameter.grad)

        return replay, loss


def passes_of(model: MambaLM) -> tuple[graphs.Passes, list[nn.Parameter]]:
    parameters = [*model.parameters()]

    def run(batch: graphs.Batch) -> Tensor:
        loss = model(**batch, loss_only=True, num_items_in_batch=10).loss
        loss.backward()
        return loss.detach()

    return graphs.Passes(run, model, parameters, PADDING_VALUES, FakeRecorder(parameters)), parameters


def direct(model: MambaLM, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    model.zero_grad()
    losses = [model(**batch, loss_only=True, num_items_in_batch=10).loss for batch in batches]
    torch.stack(losses).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [loss.detach() for loss in losses], gradients


def test_steps_of_any_shapes_have_their_gradients(make_model: Callable[..., MambaLM], samples: list[Sample]) -> None:
    """Steps of one and of several passes, of a shape that comes often and of others, fill the same memory rightly."""
    model = make_model()
    passes, parameters = passes_of(model)
    long = Sample(samples[0].ids.repeat(12), trained_from=3)
    assert len(long) > graphs.LENGTH_STEP
    small, large = [[samples[1]], [samples[2], samples[3]]], [[long]]
    steps = [
        [small], [small], [small[::-1]], [small, small], [large], [large, small], [small, large], [large, large],
        [[[samples[4]]], small], [small, [[samples[4]], [samples[5]], [samples[6]]]], [small],
    ]  # fmt: skip
    memory = None
    for step in steps:
        batches = [collate(rows) for rows in step]
        want_losses, want = direct(model, batches)
        before = passes.counts["repeated"]
        losses = [passes.run(batch) for batch in batches]
        for got, expected in zip(losses, want_losses, strict=True):
            torch.testing.assert_close(got, expected)
        for parameter, expected in zip(parameters, want, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
        if passes.counts["repeated"] > before:
            memory = memory or parameters[0].grad.data_ptr()
            assert parameters[0].grad.data_ptr() == memory  # a graph's addresses hold
        model.zero_grad(set_to_none=True)
    assert passes.counts == {"recorded": 3, "repeated": 13, "direct": 4}
    assert not model.fixed_shapes


def test_at_most_so_many_shapes_are_recorded(
    make_model: Callable[..., MambaLM], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_SHAPES", 1)
    model = make_model()
    passes, _ = passes_of(model)
    for rows in ([[samples[0]]], [[samples[0]], [samples[1]]]):
        for _ in range(3):
            passes.run(collate(rows))
            model.zero_grad()
    assert passes.counts == {"recorded": 1, "repeated": 2, "direct": 4}


def test_released_passes_begin_anew(make_model: Callable[..., MambaLM], samples: list[Sample]) -> None:
    model = make_model()
    passes, parameters = passes_of(model)
    for _ in range(2):
        for _ in range(3):
            passes.run(collate([[samples[0]]]))
            model.zero_grad()
        passes.run(collate([[samples[0]]]))
        passes.release()
        assert not passes._recordings and all(parameter.grad is None for parameter in parameters)
    assert passes.counts == {"recorded": 2, "repeated": 6, "direct": 2}


def test_a_tensor_without_gradient_stops_the_recording(
    make_model: Callable[..., MambaLM], samples: list[Sample]
) -> None:
    model = make_model()
    passes, _ = passes_of(model)
    passes._parameters.append(nn.Parameter(torch.zeros(2)))
    passes.run(collate([[samples[0]]]))
    model.zero_grad()
    with pytest.raises(RuntimeError, match="1 trained tensors got no gradient"):
        passes.run(collate([[samples[0]]]))
    assert not model.fixed_shapes


@pytest.mark.parametrize(("method", "grad_accum"), [("full", 1), ("lora", 2)])
def test_training_by_recorded_passes_is_the_same(
    make_model: Callable[..., MambaLM],
    samples: list[Sample],
    settings: Settings,
    method: str,
    grad_accum: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = METHODS[method]
    layout = plan([*map(len, samples)], epochs=1, max_steps=8, batch_size=4, grad_accum=grad_accum, capacity=64, seed=0)

    def run(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        model = chosen.attach(make_model(), AdapterSettings(dropout=0.0) if method == "lora" else AdapterSettings())
        here = dataclasses.replace(settings, folder=settings.folder / name, grad_accum=grad_accum)
        return train(model, PlannedBatches(samples, layout), here, quiet_first=chosen.quiet_first)

    plain = run("plain")
    assert plain["cuda_graph"] == {"used": False, "reason": "there are no graphs on the device cpu"}
    monkeypatch.setattr(graphs, "choose", lambda *_: graphs.Choice(True, "a test"))
    made = trainer_module.MambaTrainer.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        fake = FakeRecorder([*trainable(self.learner.model).values()])
        monkeypatch.setattr(trainer_module, "CudaRecorder", lambda device: fake)

    monkeypatch.setattr(trainer_module.MambaTrainer, "__init__", make)
    recorded = run("recorded")
    counts = recorded["cuda_graph"]
    assert counts["repeated"] >= 4 * grad_accum and counts["repeated"] + counts["direct"] == 6 * grad_accum
    for one, other in zip(plain["history"], recorded["history"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_choices(make_model: Callable[..., MambaLM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert graphs.choose("off", model, GPU) == graphs.Choice(False, "--cuda-graph off")
    assert graphs.choose("auto", model, GPU).used
    assert graphs.choose("on", model, GPU) == graphs.Choice(True, "--cuda-graph on")
    with pytest.raises(UserError, match="--cuda-graph on: there are no graphs on the device cpu"):
        graphs.choose("on", model, CPU)
    model.gradient_checkpointing = True
    assert "--checkpointing" in graphs.choose("auto", model, GPU).reason
    model.gradient_checkpointing = False
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert "several processes" in graphs.choose("auto", model, GPU).reason


@pytest.mark.parametrize(("method", "tried"), [("lora", True), ("rslora", True), ("dora", False), ("oft", False),
                                               ("lora-x", False)])  # fmt: skip
def test_adapters_that_were_not_tried_are_named(make_model: Callable[..., MambaLM], method: str, tried: bool) -> None:
    model = METHODS[method].attach(make_model(), AdapterSettings())
    choice = graphs.choose("auto", model, GPU)
    assert choice.used == tried
    assert tried or ("not tried with" in choice.reason and "--cuda-graph on tries it" in choice.reason)
    assert graphs.choose("on", model, GPU).used
