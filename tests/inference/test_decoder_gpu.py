"""The decoding step on a GPU: the fused step where the model is plain, the modules' elsewhere: ``pytest -m gpu``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from stepped_models import CONFIG, errors, hold_errors, wandering_model

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.inference.sampling import choose_tokens
from mambacus.models import MambaConfig, MambaLM

pytestmark = pytest.mark.gpu


def made(config: MambaConfig = CONFIG) -> MambaLM:
    return wandering_model(config).cuda()


@pytest.mark.parametrize("rows", [1, 3, 9, 20, 32, 40])
def test_the_fused_step_is_as_exact_as_the_modules(rows: int) -> None:
    model = made()
    decoder = Decoder(model, model, 64)
    found = errors(model, decoder, rows)
    assert decoder.unfused is None
    hold_errors(*found)


@pytest.mark.parametrize("rows", [1, 20, 60])
def test_a_step_without_a_graph_is_the_same(rows: int) -> None:
    model = made()
    replayed, now = Decoder(model, model, rows), Decoder(model, model, rows, graphs=False)
    tokens = torch.arange(3, 3 + rows, device="cuda")
    for decoder in (replayed, now):
        decoder.put(model(torch.tensor([[5, 6, 7]], device="cuda")).state, 0, rows)
    for _ in range(3):
        assert torch.equal(replayed.step(tokens), now.step(tokens))
    assert now.unfused is None and not now._graphs
    assert torch.equal(replayed.state(rows - 1).ssm_state, now.state(rows - 1).ssm_state)


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_following_takes_the_likeliest_tokens(rows: int, dtype: torch.dtype) -> None:
    """Chosen in the recorded step, they are those chosen from its logits."""
    model = made().to(dtype)
    one, other = Decoder(model, model, 64), Decoder(model, model, 64)
    first = torch.arange(3, 3 + rows, device="cuda")
    for decoder in (one, other):
        decoder.put(model(torch.tensor([[5, 6, 7]], device="cuda")).state, 0, rows)
    for _ in range(2):
        found, tokens = one.follow(first, 4), first
        for row in found:
            tokens = other.step(tokens).argmax(-1)
            assert torch.equal(row, tokens)
        first = tokens
    assert torch.equal(one.state(rows - 1).ssm_state, other.state(rows - 1).ssm_state)
    assert torch.equal(one.step(first), other.step(first))


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize(
    "rule",
    [
        {}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}, {"logit_bias": {65: 4.0}},
    ],
    ids=str,
)  # fmt: skip
def test_following_draws_the_tokens_that_are_drawn_step_by_step(rows: int, rule: dict[str, Any]) -> None:
    """Drawn in a recording, they are those drawn from the step's logits; a bias is not recorded."""
    model, params = made(), SamplingParams(temperature=0.8, **rule)
    one, other = Decoder(model, model, 64), Decoder(model, model, 64)
    tokens = torch.arange(3, 3 + rows, device="cuda")
    for decoder in (one, other):
        decoder.put(model(torch.tensor([[5, 6, 7]], device="cuda")).state, 0, rows)
    generator = torch.Generator().manual_seed(rows)
    for _ in range(2):
        draws = torch.rand(4, rows, dtype=torch.float64, generator=generator).cuda()
        for row, drawn in zip(one.follow(tokens, 4, params, draws), draws, strict=True):
            tokens = choose_tokens(other.step(tokens), params, drawn)
            assert torch.equal(row, tokens)
    assert torch.equal(one.state(rows - 1).ssm_state, other.state(rows - 1).ssm_state)
    assert len(one._choices) == (not params.logit_bias)
    one._room(1).ssm_state[:, 0] = torch.nan
    assert one.follow(tokens, 2, params, draws[:2])[:, 0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.float(), "bfloat16"),
        (lambda model: model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None), None),
        (lambda model: model.set_backend("reference"), "reference"),
    ],
    ids=["float32", "hook", "reference"],
)
def test_other_models_are_stepped_by_their_modules(change: Any, reason: str | None) -> None:
    model = made()
    change(model)
    decoder = Decoder(model, model, 4)
    hold_errors(*errors(model, decoder, 3), factor=1.01)
    assert (reason is None and not decoder._graphs) or reason in decoder.unfused


def test_biases_and_a_bfloat16_residual_stream_take_the_modules() -> None:
    for change, reason in (({"use_bias": True}, "biases"), ({"residual_in_fp32": False}, "residual")):
        model = made(dataclasses.replace(CONFIG, **change))
        decoder = Decoder(model, model, 4)
        errors(model, decoder, 2)
        assert decoder.unfused is not None and reason in decoder.unfused


def test_sees_a_model_that_changed() -> None:
    model, other = made(), wandering_model(seed=4).cuda()
    decoder = Decoder(model, model, 16)
    errors(model, decoder, 9)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log.add_(0.5)
        model.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)
    hold_errors(*errors(model, decoder, 9))
    model.load_state_dict(other.state_dict(), assign=True)
    hold_errors(*errors(model, decoder, 9))


def test_an_engine_gives_the_same_text_run_ahead_or_not() -> None:
    model = made()
    prompts = [list(range(1 + i, 5 + 3 * i)) for i in range(7)]
    params = [
        SamplingParams(max_new_tokens=3 + 7 * i, temperature=float(i % 2), seed=i, ignore_eos=i % 3 == 0, n=1 + i % 2)
        for i in range(7)
    ]
    engine = Engine(model, batch_size=16)
    found = engine.generate(prompts, params)
    again = engine.generate(prompts, params)
    kept = engine.generate(prompts, params, keep_state=True)  # looks at every token
    for one, two, three in zip(found, again, kept, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in two] == [c.token_ids for c in three]
        assert [c.finish_reason for c in one] == [c.finish_reason for c in three]
