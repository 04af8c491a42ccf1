"""The decoding step on a GPU: the fused step where the model is plain, the modules' elsewhere: ``pytest -m gpu``."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.models import MambaConfig, MambaLM

pytestmark = pytest.mark.gpu
CONFIG = MambaConfig(d_model=64, n_layer=3, vocab_size=257, dt_rank=8, d_state=16, tie_embeddings=False)


def made(config: MambaConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> MambaLM:
    """A model whose greedy text wanders."""
    torch.manual_seed(3)
    model = MambaLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval().to("cuda", dtype)


@torch.inference_mode()
def errors(model: MambaLM, decoder: Decoder, rows: int, count: int = 5) -> tuple[float, float]:
    """Step decoder, model and model in float64 together; return the worst errors of the first two's logits."""
    exact_model = copy.deepcopy(model).double()
    exact_model.set_backend("reference")
    tokens = torch.arange(1, rows + 1, device="cuda")
    ids = torch.stack([tokens, tokens + 7], 1)
    state, exact = model(ids).state, exact_model(ids).state
    worst = [0.0, 0.0]
    for row in range(rows):
        decoder.put(state.select([row]), row, 1)
    for _ in range(count):
        got = decoder.step(tokens).clone()
        out, true = model(tokens[:, None], state=state), exact_model(tokens[:, None], state=exact)
        for index, logits in enumerate((got, out.logits[:, 0])):
            error = (logits.double() - true.logits[:, 0]).norm() / true.logits[:, 0].norm()
            worst[index] = max(worst[index], error.item())
        state, exact, tokens = out.state, true.state, true.logits[:, 0].argmax(-1)
    assert decoder.state(rows - 1).tokens.item() == 2 + count
    return worst[0], worst[1]


@pytest.mark.parametrize("rows", [1, 3, 9, 20, 32, 40])
def test_the_fused_step_is_as_exact_as_the_modules(rows: int) -> None:
    model = made()
    decoder = Decoder(model, model, 64)
    fused, modules = errors(model, decoder, rows)
    assert decoder.unfused is None
    assert fused <= 1.5 * modules


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
    stepped, modules = errors(model, decoder, 3)
    assert stepped <= 1.01 * modules
    assert (reason is None and not decoder._graphs) or reason in decoder.unfused


def test_biases_and_a_bfloat16_residual_stream_take_the_modules() -> None:
    for change, reason in (({"use_bias": True}, "biases"), ({"residual_in_fp32": False}, "residual")):
        model = made(dataclasses.replace(CONFIG, **change))
        decoder = Decoder(model, model, 4)
        errors(model, decoder, 2)
        assert decoder.unfused is not None and reason in decoder.unfused


def test_sees_a_model_that_changed() -> None:
    model = made()
    decoder = Decoder(model, model, 2)
    errors(model, decoder, 2)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log.add_(0.5)
        model.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)
    fused, modules = errors(model, decoder, 2)
    assert fused <= 1.5 * modules
    model.load_state_dict({name: tensor * 1.2 for name, tensor in model.state_dict().items()}, assign=True)
    fused, modules = errors(model, decoder, 2)
    assert fused <= 1.5 * modules


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
