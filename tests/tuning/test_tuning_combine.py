"""Several adapters in one model: the formulas by hand, and the sum against PEFT's own exact one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus.models import MambaLM
from mambacus.models.signature import signature
from mambacus.runtime.errors import UserError
from mambacus.tuning.adapters import save_adapter
from mambacus.tuning.combine import Combination, check_rule, combine, parameters_of
from mambacus.tuning.merge import merge
from mambacus.tuning.methods import METHODS, AdapterSettings

INPUT = torch.arange(1, 41).view(2, 20)


@pytest.fixture
def trained(make_model: Callable[..., MambaLM]) -> Callable[..., Any]:
    """Attach an adapter whose tensors have values, as after training."""

    def make(name: str, seed: int, targets: tuple[str, ...] = (), **options: Any) -> Any:
        model = METHODS[name].attach(make_model(), AdapterSettings(targets=targets, options=options)).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


def test_a_weighted_sum_is_pefts_concatenation(
    trained: Callable[..., Any], make_model: Callable[..., MambaLM], tmp_path: Path
) -> None:
    from peft import PeftModel

    for number in (1, 2):
        save_adapter(
            trained("lora", number), tmp_path / str(number), base_model="b", base_signature=signature(make_model())
        )
    theirs = PeftModel.from_pretrained(make_model(), str(tmp_path / "1"), adapter_name="one")
    theirs.load_adapter(str(tmp_path / "2"), adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")  # type: ignore[operator]
    theirs.set_adapter("both")
    tuned = [parameters_of(merge(trained("lora", number))[0]) for number in (1, 2)]
    ours = combine(make_model(), tuned, Combination("linear", (0.7, 0.4), 1.0, 0), untied=False)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=INPUT).logits
        assert (ours(INPUT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [("linear", "svd"), ("ties", "ties_svd"), ("dare", "dare_linear_svd"), ("dare-ties", "dare_ties_svd")],
)
def test_each_rule_gives_what_peft_gives_on_the_products(
    trained: Callable[..., Any],
    make_model: Callable[..., MambaLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    theirs: str,
) -> None:
    """PEFT's ``*_svd`` combine the updates ``B A`` like us, then cut them to a rank, here the full one."""
    from peft import PeftModel
    from peft.tuners.lora import LoraModel

    for number in (1, 2):
        save_adapter(
            trained("lora", number), tmp_path / str(number), base_model="b", base_signature=signature(make_model())
        )
    model: Any = PeftModel.from_pretrained(make_model(), str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), adapter_name="two")
    inject = LoraModel.inject_adapter

    def then_seeded(*args: Any, **rest: Any) -> None:
        inject(*args, **rest)  # draws an adapter that is overwritten
        torch.manual_seed(7)

    monkeypatch.setattr(LoraModel, "inject_adapter", then_seeded)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", theirs, svd_rank=16, density=0.3)
    model.set_adapter("both")
    expected = parameters_of(model.merge_and_unload())
    tuned = [parameters_of(merge(trained("lora", number))[0]) for number in (1, 2)]
    ours = parameters_of(combine(make_model(), tuned, Combination(rule, (0.7, 0.4), 0.3, 7), untied=False))
    for name, before in parameters_of(make_model()).items():
        assert torch.allclose(ours[name], expected[name], rtol=0, atol=1e-5), name
        assert torch.equal(expected[name], before) != name.endswith(("in_proj.weight", "out_proj.weight")), name


def test_methods_of_any_kind_combine(trained: Callable[..., Any], make_model: Callable[..., MambaLM]) -> None:
    kinds = [trained("bitfit", 1), trained("sdt", 2, channels=[[1], [2]]), trained("lora", 3, targets=("lm_head",))]
    tuned = [parameters_of(merge(model)[0]) for model in kinds]
    model = combine(make_model(), tuned, Combination("linear", (1.0, 1.0, 1.0), 1.0, 0), untied=True)
    base = parameters_of(make_model())
    assert not model.config.tie_embeddings
    for name, tensor in parameters_of(model).items():
        wanted = base[name] + sum(each[name] - base[name] for each in tuned)
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_ties_follows_the_majority_of_what_is_large() -> None:
    first = torch.tensor([4.0, -3.0, 0.1, 2.0])
    second = torch.tensor([2.0, 5.0, 0.2, -0.1])
    # half is kept: [4, -3, 0, 0] and [2, 5, 0, 0]; signs +, +; the mean of those that agree: (4 + 2) / 2, 5
    ties = Combination("ties", (1.0, 1.0), 0.5, 0).apply([first, second])
    assert ties.tolist() == pytest.approx([3.0, 5.0, 0.0, 0.0])


def test_dare_keeps_a_share_and_its_mean() -> None:
    ones = torch.ones(20_000)
    torch.manual_seed(0)
    dropped = Combination("dare", (0.5, 0.5), 0.25, 0).apply([ones, ones])
    assert set(dropped.unique().tolist()) == {0.0, 2.0, 4.0}
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    whole = Combination("dare", (0.5, 0.5), 1.0, 0).apply([ones, 3 * ones])
    assert torch.equal(whole, 2 * ones)


def test_dare_is_decided_by_its_seed(trained: Callable[..., Any], make_model: Callable[..., MambaLM]) -> None:
    tuned = [parameters_of(merge(trained("lora", number))[0]) for number in (1, 2)]

    def weight(seed: int) -> torch.Tensor:
        model = combine(make_model(), tuned, Combination("dare-ties", (0.5, 0.5), 0.5, seed), untied=False)
        return parameters_of(model)["backbone.layers.0.mixer.in_proj.weight"]

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_weights_of_another_shape_are_refused(trained: Callable[..., Any], make_model: Callable[..., MambaLM]) -> None:
    tuned = [parameters_of(merge(trained(name, 1))[0]) for name in ("lora", "additional-scan")]
    with pytest.raises(UserError, match="only changes of one shape combine"):
        combine(make_model(), tuned, Combination("linear", (1.0, 1.0), 1.0, 0), untied=False)


def test_what_is_not_finite_is_refused(trained: Callable[..., Any], make_model: Callable[..., MambaLM]) -> None:
    tuned = [parameters_of(merge(trained("lora", number))[0]) for number in (1, 2)]
    with pytest.raises(UserError, match="the merge failed: the combined"):
        combine(make_model(), tuned, Combination("linear", (float("inf"), 1.0), 1.0, 0), untied=False)


def test_weights_are_one_for_each_adapter() -> None:
    assert check_rule("ties", (), 4) == (0.25,) * 4
    assert check_rule("linear", (0.3, 2.0), 2) == (0.3, 2.0)
    with pytest.raises(UserError, match="--weights: expected 2, one for each adapter, got 3"):
        check_rule("linear", (1.0, 1.0, 1.0), 2)
    with pytest.raises(UserError, match="--combine: expected one of linear, ties, dare, dare-ties, got 'sum'"):
        check_rule("sum", (), 2)
