"""LoRA where it is wanted, refusals by name, and adapter folders that know their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mambacus.models import MambaLM
from mambacus.models.adapters import attach_adapter
from mambacus.models.signature import other_base, signature
from mambacus.runtime.errors import UserError
from mambacus.tuning.adapters import read_adapter, save_adapter
from mambacus.tuning.methods import METHODS, AdapterSettings, count_parameters, find_method

attach_lora, attach_full = METHODS["lora"].attach, METHODS["full"].attach
LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj")
INPUT = torch.arange(1, 41).view(2, 20)


def disturb(model: nn.Module) -> None:
    """Give every adapter matrix a value, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)


def save(model: nn.Module, folder: Path, base: MambaLM) -> Path:
    save_adapter(model, folder, base_model="base", base_signature=signature(base))
    return folder


def test_the_default_place_and_size(make_model: Callable[..., MambaLM]) -> None:
    model = attach_lora(make_model(), AdapterSettings())
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == {"in_proj", "out_proj"}
    d_model, d_inner, n_layer, rank = 16, 32, 2, 16
    expected = n_layer * rank * ((d_model + 2 * d_inner) + (d_inner + d_model))
    assert count_parameters(model)["trainable"] == sum(p.numel() for p in trainable.values()) == expected
    assert model.peft_config["default"].lora_alpha == 32
    assert model.peft_config["default"].lora_dropout == 0.05


def test_a_fresh_adapter_changes_nothing(make_model: Callable[..., MambaLM]) -> None:
    expected = make_model()(INPUT).logits
    attached = attach_lora(make_model(), AdapterSettings()).eval()
    assert torch.equal(attached(input_ids=INPUT).logits, expected)


def test_each_target_is_called_and_gets_a_gradient(make_model: Callable[..., MambaLM]) -> None:
    model = attach_lora(make_model(), AdapterSettings(targets=(*LINEAR, "embeddings", "lm_head"), dropout=0.0))
    disturb(model)
    model(input_ids=INPUT, labels=INPUT).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert not silent


def test_full_trains_everything(make_model: Callable[..., MambaLM]) -> None:
    counts = count_parameters(attach_full(make_model(), AdapterSettings()))
    assert counts["trainable"] == counts["total"]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("in_porj",), ("'in_porj' matches no module", "did you mean 'in_proj'", "x_proj")),
        (("in_proj", "q", "k"), ("'q' matches no module", "'k' matches no module")),
        (("norm",), ("'norm' is a RMSNorm, which this method cannot adapt",)),
        (("in_proj", "*"), ("'*' is neither a module nor a regular expression",)),
        ((r"layers\.7\..*",), ("matches no module", "conv1d, dt_proj, embeddings", "or all-linear")),
    ],
)
def test_a_wrong_target_is_named(
    make_model: Callable[..., MambaLM], targets: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        attach_lora(make_model(), AdapterSettings(targets=targets))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match="full, got 'lorra'; did you mean"):
        find_method("lorra")


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [("lora", 130e6, 1e-3), ("lora", 370e6, 5e-4), ("lora", 2.8e9, 3e-4), ("full", 130e6, 1e-4), ("full", 1.4e9, 3e-5)],
)
def test_default_rates(method: str, parameters: int, rate: float) -> None:
    assert METHODS[method].learning_rate(parameters) == rate


@pytest.mark.parametrize("targets", [("in_proj", "out_proj"), LINEAR, ("embeddings",), ("lm_head", "in_proj")])
def test_a_saved_adapter_gives_the_same_logits(
    make_model: Callable[..., MambaLM], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    model = attach_lora(make_model(), AdapterSettings(targets=targets)).eval()
    disturb(model)
    expected = model(input_ids=INPUT).logits
    folder = save(model, tmp_path / "adapter", make_model())
    again = attach_adapter(make_model(), folder).eval()
    assert torch.equal(again(input_ids=INPUT).logits, expected)
    assert not torch.equal(expected, make_model()(INPUT).logits)


def test_the_folder_loads_in_peft_itself(make_model: Callable[..., MambaLM], tmp_path: Path) -> None:
    from peft import PeftConfig

    folder = save(attach_lora(make_model(), AdapterSettings()), tmp_path / "adapter", make_model())
    config = PeftConfig.from_pretrained(str(folder))
    assert (config.peft_type, config.task_type, config.base_model_name_or_path) == ("LORA", "CAUSAL_LM", "base")


def test_a_run_or_an_adapter_may_be_named(make_model: Callable[..., MambaLM], tmp_path: Path) -> None:
    folder = save(attach_lora(make_model(), AdapterSettings()), tmp_path / "adapter", make_model())
    for path in (tmp_path, folder):
        adapter = read_adapter(path)
        assert (adapter.path, adapter.base_model) == (folder, "base")
        assert set(adapter.targets) == {"in_proj", "out_proj"}


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(UserError, match=r"adapter_config\.json is missing$"):
        read_adapter(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="needs no merge"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{oh")
    with pytest.raises(UserError, match="not valid JSON"):
        read_adapter(tmp_path)


def test_an_adapter_is_refused_by_a_model_of_the_same_shape_with_other_values(
    make_model: Callable[..., MambaLM], tmp_path: Path
) -> None:
    folder = save(attach_lora(make_model(), AdapterSettings()), tmp_path / "adapter", make_model())
    other = make_model()
    with torch.no_grad():
        other.backbone.layers[1].mixer.in_proj.weight.mul_(1.01)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"made for base.*layers\.1\.mixer\.in_proj\.weight has other values"):
        attach_adapter(other, folder)
    narrow = make_model(expand=1)
    with pytest.raises(UserError, match="does not fit"):
        attach_adapter(narrow, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_known_in_any_precision(
    make_model: Callable[..., MambaLM], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = save(attach_lora(make_model(), AdapterSettings()), tmp_path / "adapter", make_model())
    assert other_base(folder, make_model().to(dtype)) is None


def test_a_folder_that_cannot_be_written(make_model: Callable[..., MambaLM], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save(attach_lora(make_model(), AdapterSettings()), tmp_path / "file" / "adapter", make_model())
