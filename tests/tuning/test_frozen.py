"""Frozen projections held in bfloat16: the same training bit for bit, at less memory, and the originals come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mambacus.models import MambaLM
from mambacus.ops.linear.gpu import autocast_linear, lora_linear
from mambacus.tuning import frozen
from mambacus.tuning.audit import TrainingStoppedError
from mambacus.tuning.data import Sample
from mambacus.tuning.graphs import Choice
from mambacus.tuning.methods import METHODS, AdapterSettings
from mambacus.tuning.packing import PlannedBatches, collate, plan
from mambacus.tuning.trainer import MambaTrainer, Settings, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def attached(make_model: Callable[..., MambaLM], method: str, targets: tuple[str, ...] = (), **changes: Any) -> Any:
    torch.manual_seed(0)
    return METHODS[method].attach(make_model(**changes), AdapterSettings(targets=targets))


def held(model: nn.Module) -> set[str]:
    names = [name.removesuffix(".weight").removesuffix(".base_layer") for name in frozen.castable(model)]
    return {name.rpartition(".")[2] for name in names}


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose on the CPU as on a GPU."""
    choose = frozen.choose
    monkeypatch.setattr(frozen, "choose", lambda model, device, autocast: choose(model, CUDA, autocast))


@pytest.mark.parametrize(
    ("method", "targets", "expected"),
    [
        ("lora", (), PROJECTIONS),
        ("lora", ("all-linear",), PROJECTIONS),
        ("pissa", (), PROJECTIONS),
        ("cs5242", (), PROJECTIONS),
        ("dora", (), ("x_proj", "dt_proj")),
        ("oft", (), ("x_proj", "dt_proj")),
        ("lora-x", (), PROJECTIONS),
        ("additional-scan", (), PROJECTIONS),
        ("state-offset", (), PROJECTIONS),
        ("full", (), ()),
    ],
)
def test_what_is_held(
    make_model: Callable[..., MambaLM], method: str, targets: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert held(attached(make_model, method, targets)) == set(expected)


def test_only_a_head_of_its_own_is_held(make_model: Callable[..., MambaLM]) -> None:
    assert "lm_head" in held(attached(make_model, "lora", tie_embeddings=False))
    assert "lm_head" not in held(attached(make_model, "lora", ("lm_head",)))


def test_the_choice_and_its_reason(make_model: Callable[..., MambaLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lora = attached(make_model, "lora")
    assert frozen.choose(lora, CUDA, torch.bfloat16).used
    assert frozen.choose(lora, CPU, torch.bfloat16) == Choice(False, "not a GPU but cpu")
    assert frozen.choose(lora, CUDA, None) == Choice(False, "no autocast to bfloat16")
    assert not frozen.choose(attached(make_model, "full"), CUDA, torch.bfloat16).used
    monkeypatch.setattr("mambacus.tuning.processes.is_sharded", lambda: True)
    assert "FSDP" in frozen.choose(lora, CUDA, torch.bfloat16).reason


def test_memory_is_given_back_and_the_originals_come_back(make_model: Callable[..., MambaLM]) -> None:
    model = attached(make_model, "lora")
    weights = frozen.castable(model)
    assert len(weights) == 8
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights.values()]
    with frozen.FrozenWeights(model) as context:
        assert all(storage.expired() for storage in storages)
        assert frozen.castable(model) == {}
        for name, weight in weights.items():
            assert torch.equal(weight, before[name].to(torch.bfloat16)) and weight.dtype == torch.bfloat16
        assert context.facts == {"tensors": 8, "bytes_saved": sum(weight.nbytes for weight in weights.values())}
    assert frozen.castable(model).keys() == before.keys()
    for name, weight in frozen.castable(model).items():
        assert weight is weights[name] and torch.equal(weight.view(torch.int32), before[name].view(torch.int32))


def test_the_originals_come_back_after_an_error(make_model: Callable[..., MambaLM]) -> None:
    model = attached(make_model, "lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = next(iter(frozen.castable(model).values()))
    with pytest.raises(KeyboardInterrupt), frozen.FrozenWeights(model):  # which wins over that a weight was changed
        weight.add_(1)
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_originals_come_back_if_not_all_can_be_cast(
    make_model: Callable[..., MambaLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(make_model, "lora")
    context = frozen.FrozenWeights(model)
    *_, last = context._weights
    context._weights[last] = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        context.__enter__()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_change_inside_is_not_hidden_by_the_originals(make_model: Callable[..., MambaLM]) -> None:
    model = attached(make_model, "lora")
    (name, weight), *_ = frozen.castable(model).items()
    original = weight.detach().clone()
    with pytest.raises(TrainingStoppedError, match=f"changed what is frozen: {name}"), frozen.FrozenWeights(model):
        weight.view(torch.int16)[0, 0] += 1
    assert torch.equal(weight, original)


def trained(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, method: str, **changes: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    targets, checkpointing = changes.pop("targets", ()), changes.pop("checkpointing", False)
    model = attached(make_model, method, targets, **changes)
    getattr(model, "get_base_model", lambda: model)().gradient_checkpointing = checkpointing
    layout = plan([*map(len, samples)], epochs=1, max_steps=4, batch_size=4, grad_accum=1, capacity=64, seed=0)
    chosen = METHODS[method]
    here = dataclasses.replace(settings, autocast=torch.bfloat16)
    results = train(model, PlannedBatches(samples, layout), here, quiet_first=chosen.quiet_first)
    return results, model.state_dict()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"targets": ("all-linear",), "tie_embeddings": False}),
        ("lora", {"checkpointing": True}),
        ("dora", {}),
        ("cs5242", {}),
        ("lora-x", {}),
        ("additional-scan", {}),
        ("bitfit", {"use_bias": True}),
    ],
    ids=str,
)
def test_training_is_the_same_bit_for_bit(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, method: str,
    changes: dict[str, Any], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    plain, expected = trained(make_model, samples, settings, method, **changes)
    request.getfixturevalue("on_a_cpu")
    here = dataclasses.replace(settings, folder=settings.folder / "held")
    results, found = trained(make_model, samples, here, method, **changes)
    assert not plain["frozen_bfloat16"]["used"]
    assert results["frozen_bfloat16"]["used"] and results["frozen_bfloat16"]["tensors"] >= 4
    assert [entry["loss"] for entry in results["history"]] == [entry["loss"] for entry in plain["history"]]
    assert [entry["grad_norm"] for entry in results["history"]] == [entry["grad_norm"] for entry in plain["history"]]
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_run_that_breaks_off_leaves_the_originals(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, on_a_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = []

    def step(self: MambaTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append({parameter.dtype for parameter in self.learner.parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr(MambaTrainer, "training_step", step)
    model = attached(make_model, "lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = plan([*map(len, samples)], epochs=1, max_steps=4, batch_size=4, grad_accum=1, capacity=64, seed=0)
    with pytest.raises(KeyboardInterrupt):
        train(model, PlannedBatches(samples, layout), dataclasses.replace(settings, autocast=torch.bfloat16))
    assert seen == [{torch.float32, torch.bfloat16}]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("product", ["linear", "lora"])
def test_the_products_of_a_gpu_take_the_weight_as_autocast_makes_it(product: str) -> None:
    torch.manual_seed(0)
    x, weight, down, up = (torch.randn(*size) for size in ((9, 24), (40, 24), (4, 24), (40, 4)))
    found = []
    for matrix in (weight, weight.bfloat16()):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
        if product == "lora":
            y = lora_linear(leaves[0], matrix, leaves[1], leaves[2], 2.0, 0.0, torch.bfloat16)
        else:
            y = autocast_linear(leaves[0], matrix, torch.bfloat16)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        found.append([y, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == (4 if product == "lora" else 2)
    for expected, got in zip(*found, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("targets", [(), ("all-linear",)], ids=str)
def test_a_pass_on_a_gpu(
    make_model: Callable[..., MambaLM], samples: list[Sample], targets: tuple[str, ...], checkpointing: bool
) -> None:
    """The same loss bit for bit, the gradients up to the order of sums in the kernels, and less memory."""
    batch = {name: tensor.cuda() for name, tensor in collate([samples[:4]]).items()}
    model = attached(make_model, "lora", targets, d_model=256, tie_embeddings=False).cuda().train()
    model.get_base_model().gradient_checkpointing = checkpointing
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, loss_only=True).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = run()
    model.zero_grad()
    allocated = torch.cuda.memory_allocated()
    with frozen.FrozenWeights(model) as context:
        assert allocated - torch.cuda.memory_allocated() > 0.9 * context.facts["bytes_saved"]
        held_loss, held_gradients = run()
    assert torch.equal(held_loss, loss) and held_gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (held_gradients[name] - expected).norm() <= 3e-3 * expected.norm(), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["off", "on"])
def test_training_on_a_gpu(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, graph: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Eager and from graphs, the run says that it holds the weights and ends as one that casts them."""
    choose, histories = frozen.choose, []
    for used in (True, False):
        monkeypatch.setattr(frozen, "choose", choose if used else lambda *about: Choice(False, "for comparison"))
        torch.manual_seed(0)
        model = METHODS["lora"].attach(make_model().cuda(), AdapterSettings(dropout=0.0))
        layout = plan([*map(len, samples)], epochs=1, max_steps=8, batch_size=4, grad_accum=1, capacity=128, seed=0)
        here = dataclasses.replace(
            settings, folder=settings.folder / str(used), device=CUDA, autocast=torch.bfloat16, cuda_graph=graph
        )
        results = train(model, PlannedBatches(samples, layout), here, quiet_first=METHODS["lora"].quiet_first)
        assert results["frozen_bfloat16"]["used"] is used and results["cuda_graph"]["used"] is (graph == "on")
        histories.append([entry["loss"] for entry in results["history"]])
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
