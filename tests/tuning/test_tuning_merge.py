"""A merge computes what the attached model computes, or is refused; a tied head is untied first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambacus.models import MambaLM
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError
from mambacus.tuning.merge import PROMPTS, compare, gate, merge, prompt_logits, touched, untie
from mambacus.tuning.methods import METHODS, AdapterSettings
from mambacus.tuning.peft_methods import silent_about_ties

LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.fixture
def attach(make_model: Callable[..., MambaLM]) -> Callable[..., Any]:
    """Attach a LoRA whose matrices have values, as after training."""

    def make(*targets: str, **changes: object) -> Any:
        model = METHODS["lora"].attach(make_model(**changes), AdapterSettings(rank=4, alpha=8, targets=targets)).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(std=0.2)
        return model

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets",
    [("in_proj", "out_proj"), LINEAR, ("embeddings",), ("lm_head",), ("embeddings", "lm_head", *LINEAR)],
    ids="+".join,
)
def test_merged_equals_attached(attach: Callable[..., Any], targets: tuple[str, ...], tied: bool) -> None:
    attached = attach(*targets, tie_embeddings=tied)
    before = prompt_logits(attached, byte_tokenizer())
    merged, untied = merge(attached)
    assert isinstance(merged, MambaLM)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    result = gate(before, prompt_logits(merged, byte_tokenizer()))
    assert result["max_logit_difference"] <= result["tolerance"] == 1e-4 * result["scale"]
    assert untied == (tied and bool({"embeddings", "lm_head"} & set(targets)))
    assert merged.config.tie_embeddings == (tied and not untied)
    assert (merged.lm_head.weight is merged.backbone.embeddings.weight) == merged.config.tie_embeddings


@pytest.mark.parametrize("target", ["embeddings", "lm_head"])
def test_merging_on_a_tied_matrix_without_untying_destroys_the_model(attach: Callable[..., Any], target: str) -> None:
    """What PEFT does alone: the update of one matrix lands in both."""
    attached = attach(target)
    before = prompt_logits(attached, byte_tokenizer())
    with silent_about_ties():
        naive = attached.merge_and_unload()
    difference = compare(before, prompt_logits(naive, byte_tokenizer()))
    assert difference["max_logit_difference"] > 0.1 * difference["scale"]
    with pytest.raises(UserError, match=r"merge refused: on 12 prompts.*nothing was written"):
        gate(before, prompt_logits(naive, byte_tokenizer()))


def test_the_gate_refuses_weights_that_were_tampered_with(attach: Callable[..., Any]) -> None:
    attached = attach("in_proj")
    before = prompt_logits(attached, byte_tokenizer())
    merged, _ = merge(attached)
    with torch.no_grad():
        merged.backbone.layers[1].mixer.out_proj.weight[3, 3] += 0.1  # type: ignore[union-attr]
    with pytest.raises(UserError, match="merge refused"):
        gate(before, prompt_logits(merged, byte_tokenizer()))


def test_the_gate_refuses_what_is_not_finite(attach: Callable[..., Any]) -> None:
    before = prompt_logits(attach("in_proj"), byte_tokenizer())
    broken = [logits.clone() for logits in before]
    broken[5][0, 0] = float("nan")
    with pytest.raises(UserError, match="merge refused"):
        gate(before, broken)


def test_an_adapter_that_is_not_finite_is_refused(attach: Callable[..., Any]) -> None:
    attached = attach("in_proj")
    with torch.no_grad():
        next(p for name, p in attached.named_parameters() if "lora_B" in name)[0, 0] = float("inf")
    with pytest.raises(UserError, match="the merge failed"):
        merge(attached)


def test_untying_changes_no_logit(make_model: Callable[..., MambaLM]) -> None:
    model = make_model()
    ids = torch.arange(9)[None]
    before = model(ids).logits
    untie(model)
    assert torch.equal(model(ids).logits, before)
    assert not model.config.tie_embeddings
    with torch.no_grad():
        model.backbone.embeddings.weight.zero_()
    assert model.lm_head.weight.abs().max() > 0


def test_touched(attach: Callable[..., Any]) -> None:
    attached = attach("embeddings", "in_proj")
    assert [touched(attached, name) for name in ("embeddings", "in_proj", "lm_head", "proj")] == [
        True,
        True,
        False,
        False,
    ]


def test_the_prompts_are_a_dozen_with_word_problems_among_them() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 12
    assert sum(prompt.startswith("Question: ") for prompt in PROMPTS) >= 4
