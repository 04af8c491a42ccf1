"""Decoding steps and choices that are repeated from recordings; graphs themselves need a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder
from torch import Tensor

from mambacus.inference import Engine, SamplingParams
from mambacus.inference import decoder as module
from mambacus.inference.decoder import Decoder
from mambacus.inference.sampling import choose_tokens
from mambacus.inference.scheduler import Scheduler, _wants_every_step
from mambacus.inference.watch import Watch
from mambacus.models import MambaLM

RULES: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "logit_bias": {65: 4.0}}, {"logit_bias": {65: 4.0}},
]  # fmt: skip


def recorded(model: MambaLM, capacity: int) -> Decoder:
    return Decoder(model, model, capacity, recorder=FakeRecorder())


def fill(model: MambaLM, decoder: Decoder, rows: int) -> None:
    ids = torch.arange(3 * rows).view(rows, 3) + 1
    with torch.inference_mode():
        state = model(ids).state
    for row in range(rows):
        decoder.put(state.select([row]), row, 1)


def run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let schedulers queue tokens on a CPU as on a GPU."""
    monkeypatch.setattr(Scheduler, "_runs_ahead", lambda self: not any(map(_wants_every_step, self._rows)))


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    looks: list[Watch] = []
    unchanged = Watch.unchanged
    monkeypatch.setattr(Watch, "unchanged", lambda self: looks.append(self) or unchanged(self))
    return looks


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_recorded_steps_are_the_models(model: MambaLM, rows: int) -> None:
    one, plain = recorded(model, 8), Decoder(model, model, 8, graphs=False)
    for decoder in (one, plain):
        fill(model, decoder, rows)
    tokens = torch.arange(1, rows + 1)
    for _ in range(4):
        want = plain.step(tokens)
        torch.testing.assert_close(one.step(tokens), want, rtol=1e-4, atol=1e-4)
        tokens = want.argmax(-1)
    torch.testing.assert_close(one.state(rows - 1).ssm_state, plain.state(rows - 1).ssm_state, rtol=1e-4, atol=1e-4)
    assert [*one._graphs] == [({1: 1, 3: 4, 5: 8}[rows], False)] and not one._tapes


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_following_chooses_as_step_by_step(model: MambaLM, rule: dict[str, Any], rows: int) -> None:
    params = SamplingParams(**rule)
    one, other = recorded(model, 4), Decoder(model, model, 4, graphs=False)
    for decoder in (one, other):
        fill(model, decoder, rows)
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.arange(1, rows + 1)
    for count in (4, 1, 6):
        draws = torch.rand(count, rows, dtype=torch.float64, generator=generator) if params.temperature else None
        found = one.follow(tokens, count, params, draws)
        for number, row in enumerate(found):
            tokens = choose_tokens(other.step(tokens), params, None if draws is None else draws[number])
            assert torch.equal(row, tokens)
    torch.testing.assert_close(one.step(tokens), other.step(tokens), rtol=1e-4, atol=1e-4)  # the last was not read
    drawn = bool(params.temperature) and not params.logit_bias
    assert len(one._choices) == drawn
    one._room(1).ssm_state[:, 0] = torch.nan
    draws = torch.rand(2, rows, dtype=torch.float64, generator=generator) if params.temperature else None
    found = one.follow(tokens, 2, params, draws)
    assert found[:, 0].tolist() == [-1, -1] and (found[:, 1:] >= 0).all()


@torch.no_grad()
def test_the_least_recently_used_choice_leaves(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHOICES", 2)
    decoder = recorded(model, 2)
    fill(model, decoder, 1)
    draws = torch.full((2, 1), 0.5, dtype=torch.float64)
    for temperature in (0.5, 0.6, 0.7, 0.5, 0.6, 0.5, 0.7, 0.5):  # each is met before it is recorded
        decoder.follow(torch.tensor([5]), 2, SamplingParams(temperature=temperature), draws)
    assert [rule[0] for _, rule in decoder._choices] == [0.7, 0.5]


@torch.no_grad()
def test_draws_of_many_numbers_are_not_recorded(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DRAWN_NUMBERS", 2 * model.config.padded_vocab_size)
    decoder, params = recorded(model, 4), SamplingParams(temperature=1.0)
    for rows in (2, 3):
        fill(model, decoder, rows)
        for _ in range(2):
            decoder.follow(torch.ones(rows, dtype=torch.int64), 2, params, torch.rand(2, rows, dtype=torch.float64))
    assert [size for size, _ in decoder._choices] == [2]


@torch.no_grad()
@pytest.mark.parametrize("rule", [{}, {"temperature": 1.0}], ids=str)
def test_a_model_that_changed_is_recorded_anew(
    model: MambaLM, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(model)
    params, draws = SamplingParams(**rule), torch.linspace(0.1, 0.9, 24, dtype=torch.float64)[:, None]
    decoder, tokens = recorded(model, 2), torch.tensor([5])
    changes: list[Callable[[], object]] = [
        lambda: model.backbone.layers[1].mixer.A_log.add_(1.5),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(0))),
        lambda: model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda *args: args[-1] * 2),
    ]
    looks = count_looks(monkeypatch)
    found: list[Tensor] = []
    for number, change in enumerate([lambda: None, *changes]):
        change()
        fill(model, decoder, 1)
        del looks[:]
        found.append(decoder.follow(tokens, 24, params, draws))
        decoder.step(found[-1][-1].clamp(min=0), unchanged=True)
        if number < len(changes):
            assert len(looks) == (number > 0)  # the first one looks afresh; one look for all steps
        fresh = Decoder(model, model, 2, graphs=False)
        fill(model, fresh, 1)
        assert torch.equal(found[-1], fresh.follow(tokens, 24, params, draws))
    assert not any(torch.equal(one, other) for one, other in zip(found[1:], found, strict=False))
    assert not decoder._graphs and not decoder._choices  # a hook's model is stepped as it is


def test_an_engine_of_recordings_completes_as_one_without(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch)
    texts = ["abc", "defgh", "i", "jk jk", "lmn", "opqrst", "uv"]
    one_rule = [SamplingParams(max_new_tokens=9 + 4 * i, temperature=0.9, seed=i, n=1 + i % 2) for i in range(7)]
    penalised = [SamplingParams(max_new_tokens=11 + i, repetition_penalty=1.5, seed=i) for i in range(7)]
    mixed = [SamplingParams(max_new_tokens=12 + i, seed=i, **RULES[i % len(RULES)]) for i in range(4)] + [
        SamplingParams(max_new_tokens=20, repetition_penalty=1.5, temperature=one) for one in (0.0, 0.5, 0.0)
    ]
    engine = Engine(model, tokenizer, batch_size=4)
    engine._decoder = decoder = recorded(model, 4)
    for params in (one_rule, penalised, mixed):
        got = engine.generate(texts, params)
        for text, one, completions in zip(texts, params, got, strict=True):
            [alone] = Engine(model, tokenizer).generate([text], one)
            assert [c.token_ids for c in completions] == [c.token_ids for c in alone]
    assert decoder._choices and {size for size, _ in decoder._graphs} >= {1, 2, 4}


@pytest.mark.parametrize("rule", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.3}], ids=str)
def test_a_change_between_two_steps_of_a_run_is_noticed(
    model: MambaLM, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch)
    params = SamplingParams(max_new_tokens=48, ignore_eos=True, **rule)

    def tokens(recorder: FakeRecorder | None, *, change: bool) -> list[int]:
        changed = copy.deepcopy(model)
        engine = Engine(changed, batch_size=2)
        engine._decoder = Decoder(changed, changed, 2, graphs=recorder is not None, recorder=recorder)
        stream = engine.stream([[5, 17, 200]], params)
        first = next(stream)
        if change:
            with torch.no_grad():
                changed.backbone.layers[1].mixer.A_log.add_(1.5)
                changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.flip(0))
        return list(chain(first.token_ids, *(piece.token_ids for piece in stream)))

    recorder = FakeRecorder()
    assert tokens(recorder, change=True) == tokens(None, change=True) != tokens(None, change=False)
    assert recorder.replays > 30


def test_a_run_looks_at_its_model_once_in_eight_tokens(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ahead(monkeypatch)
    looks = count_looks(monkeypatch)
    rules: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"repetition_penalty": 1.3}]
    for rule in rules:
        engine = Engine(model, batch_size=1)
        engine._decoder = recorded(model, 1)
        params = SamplingParams(max_new_tokens=64, ignore_eos=True, **rule)
        engine.generate([[5, 17, 200]], params)
        del looks[:]
        engine.generate([[5, 17, 200]], params)
        assert len(looks) <= 8 + 1  # one for the prompt


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "run ahead"])
def test_a_penalty_applies_to_the_tokens_of_its_own_row(
    model: MambaLM, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held to the model read anew for each token; rows of two penalties and of none, of unequal lengths."""
    if ahead:
        run_ahead(monkeypatch)
    prompts = [[5, 17, 200], [9, 9], [31, 7, 100, 3], [1, 2]]
    penalties, lengths = [4.0, 4.0, 2.0, 1.0], [30, 13, 21, 25]
    params = [
        SamplingParams(max_new_tokens=length, repetition_penalty=penalty, ignore_eos=True)
        for penalty, length in zip(penalties, lengths, strict=True)
    ]
    engine = Engine(model, batch_size=3)
    if ahead:
        engine._decoder = recorded(model, 3)
    found = engine.generate(prompts, params)
    for prompt, penalty, length, [completion] in zip(prompts, penalties, lengths, found, strict=True):
        ids = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].clone()
            marked = torch.tensor(sorted(set(ids)))
            logits[marked] = torch.where(logits[marked] > 0, logits[marked] / penalty, logits[marked] * penalty)
            ids.append(int(logits.argmax()))
        assert completion.token_ids == ids[len(prompt) :]


def test_what_was_recorded_in_inference_mode_is_repeated_outside(
    model: MambaLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch)
    engine = Engine(model, batch_size=1)
    engine._decoder = recorded(model, 1)
    params = [SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=0.8, seed=1)]
    with torch.inference_mode():
        inside = [engine.generate([[1, 2, 3]], one)[0][0].token_ids for one in params for _ in range(2)]
    assert [engine.generate([[1, 2, 3]], one)[0][0].token_ids for one in params for _ in range(2)] == inside
    assert len(engine._decoder._choices) == 1


@torch.no_grad()
@pytest.mark.parametrize("rule", [{"logit_bias": {65: 4.0}}, {"temperature": 1.0, "logit_bias": {65: 4.0}}], ids=str)
def test_a_model_is_looked_at_once_where_the_choice_is_not_recorded(
    model: MambaLM, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, params = recorded(model, 1), SamplingParams(**rule)
    fill(model, decoder, 1)
    draws = torch.rand(6, 1, dtype=torch.float64)
    decoder.follow(torch.tensor([1]), 6, params, draws)
    looks = count_looks(monkeypatch)
    decoder.follow(torch.tensor([1]), 6, params, draws)
    assert len(looks) == 1 and not decoder._choices


@torch.no_grad()
def test_a_way_to_draw_is_recorded_when_it_comes_again(model: MambaLM) -> None:
    decoder, draws = recorded(model, 1), torch.rand(3, 1, dtype=torch.float64)
    fill(model, decoder, 1)
    for temperature, known in ((0.5, 0), (0.6, 0), (0.5, 1), (0.6, 2), (0.5, 2)):
        decoder.follow(torch.tensor([1]), 3, SamplingParams(temperature=temperature), draws)
        assert len(decoder._choices) == known


@torch.no_grad()
def test_greedy_rows_have_one_rule(model: MambaLM) -> None:
    decoder = recorded(model, 1)
    fill(model, decoder, 1)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1)
    assert params.rule == SamplingParams().rule
    decoder.follow(torch.tensor([1]), 3, params)
    assert [*decoder._graphs] == [(1, True)]
