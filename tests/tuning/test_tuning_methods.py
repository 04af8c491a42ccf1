"""Every method on every kind of target: it learns by heart, loads to the same logits, merges to the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus.models import MambaLM
from mambacus.models.adapters import attach_adapter
from mambacus.models.signature import signature
from mambacus.models.ssm_adapters import SSM_METHODS
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError
from mambacus.tuning.adapters import save_adapter
from mambacus.tuning.data import Sample
from mambacus.tuning.merge import gate, merge, prompt_logits
from mambacus.tuning.methods import METHODS, AdapterSettings, count_parameters
from mambacus.tuning.packing import PlannedBatches, plan
from mambacus.tuning.peft_methods import PEFT_METHODS
from mambacus.tuning.sdt import choose_channels
from mambacus.tuning.trainer import Settings, train

ADAPTERS = [name for name, method in METHODS.items() if method.kind != "full"]
ALL_TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "embeddings", "lm_head")
LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj", "lm_head")
INPUT = torch.arange(1, 41).view(2, 20)

# what PEFT's defaults are too large for in a model this small, and what lets a method with few numbers learn
OPTIONS: dict[str, dict[str, Any]] = {
    "fourierft": {"n_frequency": 200},
    "shira": {"r": 4},
    "c3a": {"block_size": 8},
    "road": {"group_size": 8},
    "waveft": {"n_frequency": 200},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "hira": {"r": 8},
    "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "vblora": {"num_vectors": 32, "vector_length": 8},
    "adamss": {"num_subspaces": 2, "r": 8},
    "unilora": {"theta_d_length": 64},
    "sdt": {"channels": [[1, 5], [0, 7]]},
    "lora-x": {"scale": 1.0},
    "cs5242": {"r": 16},
}


def attach(model: MambaLM, name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = AdapterSettings(options=OPTIONS.get(name, {}), **changes)
    return METHODS[name].attach(model, settings)


def batches(samples: list[Sample], steps: int, capacity: int) -> PlannedBatches:
    layout = plan(
        [*map(len, samples)], epochs=1, max_steps=steps, batch_size=8, grad_accum=1, capacity=capacity, seed=0
    )
    return PlannedBatches(samples, layout)


def learn(
    model: Any, name: str, samples: list[Sample], settings: Settings, *, rate: float = 1e-2, steps: int = 4
) -> dict[str, Any]:
    """Train through the whole loop, audit included."""
    method = METHODS[name]
    data = batches(samples, steps, 64 if method.packs else 0)
    settings = dataclasses.replace(settings, learning_rate=rate, save_every=1000)
    results = train(model, data, settings, quiet_first=method.quiet_first, rate_of=method.rate_factor)
    figures: dict[str, Any] = results["train"]
    return figures


def saved(model: Any, folder: Path, base: MambaLM) -> Path:
    save_adapter(model, folder, base_model="base", base_signature=signature(base))
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_method_trains_loads_and_merges(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, tmp_path: Path, name: str
) -> None:
    """The audit passes, the loss falls, and the folder gives the trained logits, attached and merged."""
    model = attach(make_model(), name)
    figures = learn(model, name, samples, settings)
    assert figures["loss_last"] < figures["loss_first"]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=INPUT).logits
        again = attach_adapter(make_model(), saved(model, tmp_path / "adapter", make_model())).eval()
        scale = expected.abs().max()
        exact = name not in ("pissa", "olora")  # they are written as the difference from the base
        assert (again(input_ids=INPUT).logits - expected).abs().max() <= (0 if exact else 1e-5 * scale)
        assert (make_model()(INPUT).logits - expected).abs().max() > 1e-4
    if name in SSM_METHODS and SSM_METHODS[name].no_fold:
        with pytest.raises(UserError, match="cannot be merged into a plain model: it"):
            merge(again)
        return
    before = prompt_logits(again, byte_tokenizer())
    merged, _ = merge(again)
    assert isinstance(merged, MambaLM)
    gate(before, prompt_logits(merged, byte_tokenizer()))
    assert all(".lora" not in path and "parametrizations" not in path for path, _ in merged.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rate", "steps", "reached"),
    [
        *((name, 3e-2, 150, 0.5) for name in ("lora", "lora+", "rslora", "dora", "pissa", "olora", "cs5242", "sdt")),
        *((name, 3e-2, 150, 0.5) for name in ("miss", "gralora", "hira", "shira", "delora", "loha", "lora-x")),
    ],
)
def test_methods_with_enough_numbers_learn_eight_samples_by_heart(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings,
    name: str, rate: float, steps: int, reached: float,
) -> None:  # fmt: skip
    targets = LINEAR if METHODS[name].kind == "peft" and name != "cs5242" else ()
    dropout = 0.0 if name in ("lora", "lora+", "rslora", "dora", "pissa", "olora", "cs5242", "sdt", "lora-x") else None
    # a head that is left as it is sets a floor, whatever goes before it: 2.88 nats at a width of 16, 0.005 at 64
    sizes = {"d_model": 64} if METHODS[name].kind == "ssm" else {}
    sizes |= {"dt_rank": 8, "vocab_size": 264} if name in ("miss", "gralora", "shira") else {}  # they need such
    model = make_model(**sizes)
    figures = learn(
        attach(model, name, targets=targets, dropout=dropout), name, samples, settings, rate=rate, steps=steps
    )
    assert figures["loss_last"] < reached


@pytest.mark.parametrize("target", [*ALL_TARGETS, "all-linear", r"backbone\.layers\.1\..*_proj"])
def test_lora_trains_loads_and_merges_on_each_target(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, tmp_path: Path, target: str
) -> None:
    model = attach(make_model(), "lora", targets=(target,), dropout=0.0)
    figures = learn(model, "lora", samples, settings, rate=3e-2, steps=12)
    assert figures["loss_last"] < figures["loss_first"] * (1 if target == "dt_proj" else 0.97)  # it moves steps alone
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=INPUT).logits
        again = attach_adapter(make_model(), saved(model, tmp_path / "adapter", make_model())).eval()
        assert torch.equal(again(input_ids=INPUT).logits, expected)
    before = prompt_logits(again, byte_tokenizer())
    gate(before, prompt_logits(merge(again)[0], byte_tokenizer()))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x_proj", "dt_proj", "lm_head", "all-linear"])
@pytest.mark.parametrize("name", [name for name in PEFT_METHODS if name != "lora"])
def test_each_method_goes_on_each_linear_target(
    make_model: Callable[..., MambaLM], samples: list[Sample], settings: Settings, tmp_path: Path,
    name: str, target: str,
) -> None:  # fmt: skip
    """What the default places and LoRA's own test leave open; the model's sizes are such that all methods fit."""

    def fitting_model() -> MambaLM:
        return make_model(dt_rank=8, vocab_size=264)

    model = attach(fitting_model(), name, targets=(target,))
    figures = learn(model, name, samples, settings, rate=1e-3 if name == "fourierft" else 1e-2)  # it scales by 300
    assert figures["loss_last"] < figures["loss_first"] * (1.001 if target == "dt_proj" else 1)  # it moves steps alone
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=INPUT).logits
        again = attach_adapter(fitting_model(), saved(model, tmp_path / "adapter", fitting_model())).eval()
        assert (again(input_ids=INPUT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = prompt_logits(again, byte_tokenizer())
    gate(before, prompt_logits(merge(again)[0], byte_tokenizer()))


@pytest.mark.parametrize("name", [name for name in PEFT_METHODS if PEFT_METHODS[name].kinds == (torch.nn.Linear,)])
def test_a_method_for_linear_layers_says_so(make_model: Callable[..., MambaLM], name: str) -> None:
    with pytest.raises(UserError, match="'conv1d' is a CausalConv1d, which this method cannot adapt"):
        attach(make_model(), name, targets=("conv1d",))


def test_the_convolution_starts_as_asked(make_model: Callable[..., MambaLM]) -> None:
    def starts(how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        settings = AdapterSettings(options={"init_lora_weights": how}, targets=("conv1d",), rank=2)
        torch.manual_seed(0)
        layer = METHODS["lora"].attach(make_model(), settings).get_base_model().backbone.layers[0].mixer.conv1d
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    (plain, zeros), (gaussian, zeros_too), (_, other) = starts(True), starts("gaussian"), starts(False)
    assert not zeros.any() and not zeros_too.any() and other.all()
    assert plain.abs().max() <= 0.5 < gaussian.abs().max()  # uniform within 1 / sqrt(d_conv), normal of 1 / rank
    with pytest.raises(UserError, match="on a convolution: expected true, false or gaussian, got 'orthogonal'"):
        starts("orthogonal")


def test_the_convolution_changes_by_its_low_rank_product(make_model: Callable[..., MambaLM]) -> None:
    model = attach(make_model(), "lora", targets=("conv1d",), rank=2, alpha=6.0)
    plain = make_model()
    with torch.no_grad():
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.normal_()
                update = 3.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight  # (d_inner, d_conv)
                plain.get_submodule(path).weight += update[:, None]
        assert torch.allclose(model.eval()(input_ids=INPUT).logits, plain(INPUT).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lora", {"rang": 3}, "LoraConfig has no key 'rang'"),
        ("vera", {"rank": 3}, "VeraConfig has no key 'rank'"),
        ("sdt", {"chanels": []}, "chanels: sdt has the options rank, alpha, dropout, share, channels; did you mean"),
        ("state-offset", {"where": "x"}, "expected h or y, got 'x'"),
        ("affix", {"tokens": 0}, "tokens: expected a positive number, got 0"),
        ("affix", {"tokens": "many"}, "tokens: expected int, got 'many'"),
        ("bitfit", {"rank": 2}, "bitfit has the options none"),
        ("sdt", {"channels": [[1]]}, "expected the channels of 2 layers, got 1"),
        ("c3a", {"block_size": 7}, "block size should be a factor"),
        ("lora", {"init_lora_weights": "pissa"}, "got 'pissa'; --method pissa starts so and saves the difference"),
        ("dora", {"init_lora_weights": "pissa_niter_4"}, "got 'pissa_niter_4'; --method pissa starts so"),
        ("cs5242", {"init_lora_weights": "OLoRA"}, "got 'OLoRA'; --method olora starts so"),
        (
            "lora",
            {"init_lora_weights": "eva"},
            "expected true, false, gaussian, orthogonal, mica, got 'eva'; that start",
        ),
        ("rslora", {"init_lora_weights": "corda"}, "got 'corda'; that start needs what PEFT prepares from data"),
        ("lora", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "got 'loftq'; that start needs"),
        ("lora+", {"init_lora_weights": "lora_ga"}, "got 'lora_ga'; that start needs"),
        ("pissa", {"init_lora_weights": "gaussian"}, "expected pissa[_niter_N], got 'gaussian'"),
        ("olora", {"init_lora_weights": True}, "expected olora, got True"),
        ("pissa", {"use_dora": True}, "in_proj.lora_magnitude_vector has no place in it"),
        ("pissa", {"bias": "all"}, "conv1d.bias has no place in it"),
        ("pissa", {"alpha_pattern": {"in_proj": 4}}, "one rank and one alpha for all modules"),
        ("olora", {"rank_pattern": {"in_proj": 4}}, "one rank and one alpha for all modules"),
    ],
)
def test_a_wrong_key_is_named(
    make_model: Callable[..., MambaLM], name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        METHODS[name].attach(make_model(), AdapterSettings(options=options))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("lora", {"init_lora_weights": how}) for how in ("gaussian", "orthogonal", "mica", False)),
        *(("pissa", options) for options in ({"init_lora_weights": "pissa_niter_2"}, {"use_rslora": True})),
    ],
)
def test_an_initialisation_that_is_taken_is_saved_whole(
    make_model: Callable[..., MambaLM], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """What is loaded draws other numbers than what was trained, so nothing may hang on the start."""
    plain = make_model()
    torch.manual_seed(2)  # after make_model, which sets its own
    model: Any = METHODS[name].attach(plain, AdapterSettings(rank=8, options=options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(input_ids=INPUT).logits
        folder = saved(model, tmp_path / "adapter", make_model())
        plain = make_model()
        torch.manual_seed(3)
        again: Any = attach_adapter(plain, folder).eval()
        tolerance = 1e-5 * expected.abs().max()
        assert (again(input_ids=INPUT).logits - expected).abs().max() <= tolerance
        assert (merge(again)[0](INPUT).logits - expected).abs().max() <= tolerance


def test_methods_with_their_own_places_take_no_targets(make_model: Callable[..., MambaLM]) -> None:
    with pytest.raises(UserError, match="lora-x has its own places"):
        attach(make_model(), "lora-x", targets=("in_proj",))


def test_pefts_own_keys_are_honoured(make_model: Callable[..., MambaLM]) -> None:
    settings = AdapterSettings(rank=3, options={"use_rslora": True, "lora_bias": True, "layers_to_transform": [1]})
    model: Any = METHODS["lora"].attach(make_model(), settings)
    config = model.peft_config["default"]
    assert (config.r, config.use_rslora, config.lora_bias) == (3, True, True)
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".layers.1." in path for path in trained)


def test_lora_plus_gives_b_sixteen_times_the_rate() -> None:
    method = METHODS["lora+"]
    assert method.rate_factor("x.lora_B.default.weight") == 16 and method.rate_factor("x.lora_A.default.weight") == 1
    assert METHODS["lora"].rate_factor("x.lora_B.default.weight") == 1


def test_cs5242_is_the_study_as_it_was(make_model: Callable[..., MambaLM]) -> None:
    method = METHODS["cs5242"]
    assert method.preset == {"batch_size": 1, "loss": "full"}
    assert {method.learning_rate(n) for n in (130e6, 1.4e9)} == {2e-4}
    config = METHODS["cs5242"].attach(make_model(), AdapterSettings()).peft_config["default"]  # type: ignore[union-attr]
    assert (config.r, set(config.target_modules)) == (64, {"x_proj", "embeddings", "in_proj", "out_proj"})


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lora", {}, 24 * 16 * ((768 + 3072) + (1536 + 768))),
        ("lora-x", {}, 24 * 64 * (768 + 1536)),
        ("state-offset", {}, 24 * 1536 * 16),
        ("state-offset", {"where": "y"}, 24 * 1536),
        ("init-state", {}, 24 * 1536 * 16),
        ("init-state", {"conv": True}, 24 * 1536 * (16 + 4)),
        ("affix", {}, 24 * 16 * 768),
        ("additional-scan", {}, 24 * 4 * 3 * 1536),
        ("bitfit", {}, 24 * 2 * 1536),
        ("sdt", {"channels": [[*range(15)]] * 24}, 24 * (16 * (768 + 3072 + 1536 + 768) + 3 * 16 * 15)),
    ],
)
def test_the_parameters_of_a_130m_model(name: str, options: dict[str, Any], expected: int) -> None:
    """The shares the papers give: lora 1.83 %, lora-x 2.74, state-offset 0.46 and 0.03, init-state 0.46 %."""
    from mambacus.models.registry import RANDOM_SIZES

    with torch.device("meta"):
        model = METHODS[name].attach(MambaLM(RANDOM_SIZES["130m"]), AdapterSettings(options=options))
        counts = count_parameters(model)
    assert counts["trainable"] == expected


def test_sdt_takes_the_channels_whose_rates_move_most(
    make_model: Callable[..., MambaLM], samples: list[Sample]
) -> None:
    model = make_model()
    data = batches(samples, 3, 64)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    chosen = choose_channels(model, data, share=0.1, rate=1e-2)
    assert [len(channels) for channels in chosen] == [3, 3]  # of 32
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight[:, 4:] = 0  # type: ignore[union-attr]
        model.backbone.layers[0].mixer.x_proj.weight.zero_()  # type: ignore[union-attr]
        model.backbone.layers[0].mixer.x_proj.weight[:, :4] = 0.1  # type: ignore[union-attr]
    (first, _) = choose_channels(model, data, share=0.1, rate=1e-2)
    assert set(first) <= {0, 1, 2, 3}, "only channels whose output is read get a gradient on their rates"


def test_sdt_takes_the_same_channels_however_a_step_is_split(
    make_model: Callable[..., MambaLM], samples: list[Sample]
) -> None:
    """The choice belongs to the mathematics of a run: it depends on neither processes nor accumulation."""

    def chosen(**split: int) -> list[list[int]]:
        settings = {"epochs": 1, "max_steps": 3, "batch_size": 6, "grad_accum": 1, "capacity": 64, "seed": 0}
        data = PlannedBatches(samples, plan([*map(len, samples)], **(settings | split)))  # type: ignore[arg-type]
        return choose_channels(make_model(), data, share=0.2, rate=1e-2)

    assert chosen() == chosen(grad_accum=2) == chosen(processes=2) == chosen(grad_accum=2, processes=2)
