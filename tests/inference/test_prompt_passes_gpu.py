"""Prompts read from CUDA graphs are those read without, on a GPU: ``pytest -m gpu tests/inference``."""

from __future__ import annotations

import random

import pytest
import torch
from stepped_models import wandering_model

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.inference.prompt_passes import PromptPasses, Read
from mambacus.models import MambaLM

pytestmark = pytest.mark.gpu


def made(dtype: torch.dtype) -> MambaLM:
    return wandering_model(dtype=dtype).cuda()


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 257) for _ in range(length)] for length in lengths]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def hold(got: Read, want: Read, bound: float) -> None:
    assert torch.equal(got.state.tokens, want.state.tokens)
    assert relative(got.logits, want.logits) <= bound
    assert relative(got.state.conv_state, want.state.conv_state) <= bound
    assert relative(got.state.ssm_state, want.state.ssm_state) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
@torch.no_grad()
def test_passes(dtype: torch.dtype, bound: float) -> None:
    """Repeated passes give the first one's bits, whatever ran between, and the numbers of a pass that is as it is."""
    model = made(dtype)
    passes, plain = PromptPasses(model, model), PromptPasses(model, model, graphs=False)
    shapes = [[16], [5], [2048], [1500], [16] * 4, [40, 3, 17], [1], [300] * 2, [64, 64, 64, 1]]
    batches = [prompts(index, lengths) for index, lengths in enumerate(shapes)]
    states = [plain.run(prompts(99, [7] * len(batch)), None).state for batch in batches]
    for given in (None, states):
        first = []
        for turn in range(3):
            for index, batch in enumerate(batches):
                got = passes.run(batch, given and given[index])
                if turn == 0:
                    first.append(got)
                    hold(got, plain.run(batch, given and given[index]), bound)
                for name in ("conv_state", "ssm_state", "tokens"):
                    assert torch.equal(getattr(got.state, name), getattr(first[index].state, name)), (turn, index)
                assert torch.equal(got.logits, first[index].logits)
    assert passes.counts["repeated"] >= 4 * len(batches) and plain.counts["repeated"] == 0


@torch.no_grad()
def test_an_engine_gives_the_same_text_with_graphs_and_without() -> None:
    model = made(torch.float32)
    engine, plain = Engine(model, batch_size=8), Engine(model, batch_size=8, graphs=False)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    for seed, lengths in enumerate([[16], [16], [16], [9], [12, 3, 40], [33, 5, 8], [16], [600], [520], [12, 30, 2]]):
        batch = prompts(seed, lengths)
        got, want = engine.generate(batch, params), plain.generate(batch, params)
        assert [[c.token_ids for c in row] for row in got] == [[c.token_ids for c in row] for row in want], lengths
    assert engine._passes.counts["repeated"] >= 5


def test_new_numbers_are_seen() -> None:
    """In place, through ``.data``, in A_log and elsewhere, by what is repeated and by what is kept for it."""
    model = made(torch.float32)
    engine, params = Engine(model), SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=1)
    [batch] = [prompts(0, [16])]

    def complete(with_engine: Engine) -> list[float]:
        [[completion]] = with_engine.generate(batch, params)
        return [score.logprob for score in completion.logprobs]

    found = [complete(engine) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    mixer = model.backbone.layers[1].mixer
    for tensor in (mixer.A_log.data, mixer.A_log, mixer.in_proj.weight.data, mixer.conv1d.weight, mixer.conv1d.bias):
        with torch.no_grad():
            tensor.mul_(1.5)
        now, fresh = complete(engine), complete(Engine(model))
        assert now == pytest.approx(fresh, abs=1e-4) and now != pytest.approx(found[-1], abs=1e-3)
        found.append(now)


def test_what_is_kept_of_the_layers_needs_no_second_look() -> None:
    """A look at all layers at once gives the bits of each layer's own: else every run would record anew."""
    model = made(torch.bfloat16)
    decoder = Decoder(model, model, 1)
    versions = [block.mixer.A_log._version for block in model.backbone.layers]
    for _ in range(2):
        decoder.begin()
    assert versions == [block.mixer.A_log._version for block in model.backbone.layers]
