"""The decoding step on a CPU: recorded, it gives what the model gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mambacus.inference.decoder import TAPED_ROWS, Decoder
from mambacus.models import MambaLM
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
    assert (decoder._tapes.get(rows) is not None) == (rows <= TAPED_ROWS)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.backbone.layers[1].mixer.A_log.add_(0.5),
        lambda model: model.backbone.layers[1].mixer.in_proj.weight.mul_(2),
        lambda model: model.lm_head.weight.set_(model.lm_head.weight.clone() * 2),
        lambda model: quantise(model, "int8"),
        lambda model: model.set_backend("reference"),
    ],
    ids=["A_log", "in place", "in other memory", "quantised", "backend"],
)
def test_sees_a_model_that_changed(model: MambaLM, change: Any) -> None:
    model = copy.deepcopy(model)
    decoder = Decoder(model, model, 2)
    assert steps(model, decoder, 1) == 0
    with torch.no_grad():
        change(model)
    assert steps(model, decoder, 1) == 0


def test_what_cannot_be_watched_is_stepped_freely(model: MambaLM) -> None:
    with torch.inference_mode():
        made_here = MambaLM(model.config)
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    for each in (made_here, hooked):
        decoder = Decoder(each, each, 2)
        assert steps(each, decoder, 1) == 0 and not decoder._tapes
