"""The decoding step on a CPU: recorded, it gives what the model gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mambacus.inference import Engine, SamplingParams
from mambacus.inference import decoder as decoder_module
from mambacus.inference.decoder import LOANS, ROUNDED_ROWS, TAPED_ROWS, Decoder
from mambacus.inference.watch import Watch
from mambacus.models import MambaLM
from mambacus.models.mamba import RMSNorm
from mambacus.models.quantised import quantise


def steps(model: MambaLM, decoder: Decoder, rows: int, count: int = 5) -> float:
    """Step decoder and model together; return the largest difference of their logits."""
    tokens = torch.arange(1, rows + 1)
    with torch.inference_mode():
        out = model(torch.stack([tokens, tokens + 7], 1))
        state, worst = out.state, 0.0
        for row in range(rows):
            decoder.put(state.select([row]), row, 1)
        for _ in range(count):
            got, out = decoder.step(tokens), model(tokens[:, None], state=state)
            worst = max(worst, (got - out.logits[:, 0]).abs().max().item())
            state, tokens = out.state, out.logits[:, 0].argmax(-1)
        assert decoder.state(rows - 1).tokens.item() == 2 + count
    return worst


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, TAPED_ROWS + 1])
def test_steps_as_the_model_does(model: MambaLM, weights: str | None, dtype: torch.dtype, rows: int) -> None:
    model = copy.deepcopy(model).to(dtype)
    if weights:
        quantise(model, weights)
    decoder = Decoder(model, model, TAPED_ROWS + 1)
    assert steps(model, decoder, rows) == 0
    assert decoder._tapes.get(rows) is not None


@pytest.mark.parametrize("rows", [1, 3])
def test_following_takes_the_likeliest_tokens(model: MambaLM, rows: int) -> None:
    one, other = Decoder(model, model, rows), Decoder(model, model, rows)
    with torch.inference_mode():
        tokens = torch.arange(1, rows + 1)
        for decoder in (one, other):
            decoder.put(model(torch.tensor([[5, 6, 7]])).state, 0, rows)
        found = one.follow(tokens, 4)
        for row in found:
            tokens = other.step(tokens).argmax(-1)
            assert torch.equal(row, tokens)
        assert torch.equal(one.step(tokens), other.step(tokens))  # the last one was not read
        one._room(1).ssm_state[:, 0] = torch.nan
        assert one.follow(tokens, 2)[:, 0].tolist() == [-1, -1]


def test_a_tape_of_many_rows_serves_fewer_too(model: MambaLM) -> None:
    """Rows beyond the batch compute nothing that a row of it, or who takes their slot next, sees."""
    most = TAPED_ROWS + ROUNDED_ROWS
    decoder = Decoder(model, model, most)
    for count in (most, most - 4, most):  # multiples of four, which the products take in one order of summation
        assert steps(model, decoder, count) == 0
    assert [*decoder._tapes] == [most]


def test_a_size_borrows_a_larger_tape_before_it_gets_its_own(model: MambaLM) -> None:
    decoder = Decoder(model, model, 16)
    assert steps(model, decoder, 16, count=3) == 0
    for _ in range(LOANS):
        assert steps(model, decoder, 12, count=1) == 0
    assert [*decoder._tapes] == [16]
    assert steps(model, decoder, 12, count=3) == 0 and decoder._tapes[12] is not None
    assert steps(model, decoder, 5, count=1) == 0 and decoder._tapes[5] is None  # few rows do not
    with torch.no_grad():
        model = copy.deepcopy(model)
        decoder = Decoder(model, model, 16)
        assert steps(model, decoder, 16, count=3) == 0
        assert steps(model, decoder, 12, count=1) == 0
        model.backbone.layers[1].mixer.A_log.add_(0.5)
        assert steps(model, decoder, 12, count=1) == 0  # not from a tape of the model as it was
        assert decoder._tapes == {12: None} and not decoder._loans


class Wrapped(torch.nn.Module):
    """A module in another, which knows neither of positions nor of new arguments."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


@pytest.mark.parametrize("whole", [False, True], ids=["mixer", "block"])
def test_what_is_kept_of_a_wrapped_layer_follows_it(model: MambaLM, whole: bool) -> None:
    model = copy.deepcopy(model)
    mixer = model.backbone.layers[0].mixer
    if whole:
        model.backbone.layers[0] = Wrapped(model.backbone.layers[0])
    else:
        model.backbone.layers[0].mixer = Wrapped(mixer)
    engine, params = Engine(model, batch_size=1), SamplingParams(max_new_tokens=4)
    engine.generate([[1, 2, 3]], params)
    mixer.A_log.data.add_(1.0)
    engine.generate([[1, 2, 3]], params)
    with torch.no_grad():
        assert torch.equal(mixer.decay(), -torch.exp(mixer.A_log))


def test_a_wide_model_is_not_taped_for_many_rows(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "TAPED_NUMBERS", TAPED_ROWS * model.config.d_inner)
    decoder = Decoder(model, model, TAPED_ROWS + 1)
    assert steps(model, decoder, TAPED_ROWS + 1) == 0 and not decoder._tapes


def twice(*args: Any) -> Any:
    """As a hook of a module: what it gives, or takes, doubled."""
    return args[-1] * 2 if isinstance(args[-1], torch.Tensor) else (args[-1][0] * 2, *args[-1][1:])


def step_optimiser(model: MambaLM) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.zero_grad()


def double_output(module: torch.nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.backbone.layers[1].mixer.A_log.add_(0.5),
        lambda model: model.backbone.layers[1].mixer.in_proj.weight.mul_(2),
        lambda model: model.backbone.layers[0].mixer.dt_proj.bias.data.add_(1),
        lambda model: model.backbone.layers[0].mixer.conv1d.weight.data.mul_(2),
        step_optimiser,
        lambda model: model.lm_head.weight.set_(model.lm_head.weight.clone() * 2),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight * 2)),
        lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True),
        lambda model: quantise(model, "int8"),
        lambda model: model.set_backend("reference"),
        lambda model: setattr(model.backbone.layers[1].mixer, "out_proj", model.backbone.layers[0].mixer.out_proj),
    ],
    ids=["A_log", "in place", "dt_proj.bias", "conv1d", "optimiser", "in other memory", "another parameter", "assigned",
         "quantised", "backend", "another module"],
)  # fmt: skip
def test_sees_a_model_that_changed(model: MambaLM, change: Any) -> None:
    model = copy.deepcopy(model)
    decoder = Decoder(model, model, 2)
    assert steps(model, decoder, 1) == 0
    with torch.no_grad():
        change(model)
    assert steps(model, decoder, 1) == 0
    assert decoder._tapes[1] is not None


@pytest.mark.parametrize(
    "add",
    [
        lambda model: model.register_forward_pre_hook(lambda *args: None),
        lambda model: model.backbone.layers[0].mixer.out_proj.register_forward_hook(twice),
        lambda model: model.backbone.layers[1].mixer.in_proj.register_forward_pre_hook(twice),
        lambda model: register_module_forward_hook(lambda m, _, out: out * 2 if m is model.lm_head else None),
        lambda model: register_module_forward_pre_hook(lambda m, args: twice(args) if m is model.lm_head else None),
        lambda model: double_output(model.backbone.layers[1].mixer.x_proj),
    ],
    ids=["on the model", "hook", "pre-hook", "hook of all", "pre-hook of all", "forward"],
)
def test_runs_the_code_of_others(model: MambaLM, add: Any) -> None:
    model = copy.deepcopy(model)
    decoder = Decoder(model, model, 2)
    assert steps(model, decoder, 1) == 0
    handle = add(model)
    try:
        assert steps(model, decoder, 1) == 0
        assert not decoder._tapes
    finally:
        if handle is not None:
            handle.remove()
    assert steps(model, decoder, 1) == 0


def test_sees_a_class_that_changed(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model, model, 2)
    assert steps(model, decoder, 1) == 0
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x, added=None: forward(self, x * 2, added))
    assert steps(model, decoder, 1) == 0


def test_every_module_s_backend_counts(model: MambaLM) -> None:
    model = copy.deepcopy(model)
    for module in (model.backbone.layers[1].mixer, model.backbone.layers[1].mixer.conv1d):
        watch = Watch(model)
        assert watch.plain and watch.unchanged()
        module.backend = "reference"
        assert watch.plain and not watch.unchanged()


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_two_runs_of_an_engine_see_new_numbers_between_them(model: MambaLM, weights: str | None) -> None:
    model = copy.deepcopy(model)
    if weights:
        quantise(model, weights)
    engine = Engine(model)

    def complete(engine: Engine) -> Any:
        [[completion]] = engine.generate([[5, 17, 200]], SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=1))
        return completion.token_ids, completion.logprobs

    mixer: Any = model.backbone.layers[1].mixer
    found = [complete(engine)]
    changed = [mixer.A_log.data, mixer.dt_proj.bias, mixer.conv1d.weight]
    changed += [mixer.in_proj.scales.data, model.lm_head.scales] if weights else [mixer.in_proj.weight.data]
    for tensor in changed:
        with torch.no_grad():
            tensor.mul_(1.5)
        found.append(complete(engine))
        assert found[-1] == complete(Engine(copy.deepcopy(model)))
        assert found[-1] != found[-2]


def test_on_a_gpu_numbers_need_no_watch(model: MambaLM) -> None:
    with torch.inference_mode():
        made_here = MambaLM(model.config)
    assert not Watch(made_here).plain
    with torch.inference_mode():
        elsewhere = made_here.to("meta")  # not a CPU, as a GPU
    assert elsewhere.backbone.layers[0].mixer.A_log.is_inference()
    watch = Watch(elsewhere)
    assert watch.plain and watch.unchanged()


def test_what_cannot_be_watched_is_stepped_freely(model: MambaLM) -> None:
    with torch.inference_mode():
        made_here = MambaLM(model.config)
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    for each in (made_here, hooked):
        decoder = Decoder(each, each, 2)
        assert steps(each, decoder, 1) == 0 and not decoder._tapes
