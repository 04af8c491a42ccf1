"""Passes over prompts that are repeated from recordings; graphs themselves need a GPU."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder

from mambacus.inference import Engine, SamplingParams
from mambacus.inference import prompt_passes as module
from mambacus.inference.prompt_passes import BUCKETS, LENGTHS, PromptPasses, Read, Shape
from mambacus.models import MambaLM, MambaState


def recorded(model: MambaLM) -> PromptPasses:
    return PromptPasses(model, model, recorder=FakeRecorder())


def hold_equal(one: Read, other: Read) -> None:
    pairs = [(one.logits, other.logits)]
    pairs += [(getattr(one.state, name), getattr(other.state, name)) for name in ("conv_state", "ssm_state", "tokens")]
    assert all(torch.equal(*pair) for pair in pairs)


def hold_close(one: Read, other: Read) -> None:
    assert one.logits.shape == other.logits.shape and torch.equal(one.state.tokens, other.state.tokens)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.state.conv_state, other.state.conv_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.state.ssm_state, other.state.ssm_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_of_any_lengths_are_read_as_without_recordings(model: MambaLM) -> None:
    """Rows and tokens that fill a shape and that do not, from beginnings and from states, in any order."""
    draw = random.Random(0)
    passes, plain = recorded(model), PromptPasses(model, model)
    states: dict[int, MambaState] = {}
    for turn in range(60):
        rows = draw.choice([1, 2, 3, 4, 5])
        longest = draw.choice([1, 7, 16, 20, 32, 40])
        lengths = [draw.randint(1, longest) for _ in range(rows)] if turn % 3 else [longest] * rows
        parts = [[draw.randrange(257) for _ in range(length)] for length in lengths]
        state = states.get(rows) if turn % 2 else None
        want, got = plain.run(parts, state), passes.run(parts, state)
        hold_close(got, want)
        states[rows] = got.state
    assert passes.counts["repeated"] > 20 and passes.counts["recorded"] <= module.MOST_RECORDINGS
    assert plain.counts == {"recorded": 0, "repeated": 0, "direct": 60}


@torch.no_grad()
def test_the_second_pass_of_a_shape_is_recorded_and_no_number_changes(model: MambaLM) -> None:
    passes = recorded(model)
    one, two = [[1, 2, 3], [4, 5, 6, 7, 8]], [[9] * 12, [7]]
    found = []
    for parts in (one, two, one, two, one):
        found.append((passes.run(parts, None), parts))
    assert passes.counts == {"recorded": 1, "repeated": 4, "direct": 1}
    for read, parts in found:
        hold_equal(read, found[0][0] if parts is one else found[1][0])  # and no later pass wrote into it


@torch.no_grad()
def test_shapes(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = recorded(model)
    assert passes._shape([[0] * 16]) == Shape(1, 16, padded=False)
    assert passes._shape([[0] * 15]) == Shape(1, 16, padded=True)
    assert passes._shape([[0] * 16] * 3) == Shape(4, 16, padded=True)
    assert passes._shape([[0] * 64, [0]]) == Shape(2, 64, padded=True)
    assert passes._shape([[0] * 4096]) == Shape(1, 4096, padded=False)
    assert passes._shape([[0] * 4097] * 2) is None  # 2 x 5120
    assert passes._shape([[0] * (LENGTHS[-1] + 1)]) is None and passes._shape([[0]] * (BUCKETS[-1] + 1)) is None
    config = model.config
    row = config.n_layer * config.d_inner * (4 * config.d_state + 4 * config.d_conv)
    monkeypatch.setattr(module, "MOST_STATE_BYTES", 2 * row)
    assert passes._shape([[0]] * 2) is not None and passes._shape([[0]] * 3) is None
    monkeypatch.setattr(module, "MOST_NUMBERS", 32 * config.d_model * config.d_inner)
    assert passes._shape([[0] * 32]) is not None and passes._shape([[0] * 33]) is None
    long = [[5] * 40]
    hold_equal(passes.run(long, None), PromptPasses(model, model).run(long, None))  # as it is


@torch.no_grad()
def test_the_least_recently_used_recording_makes_room_but_not_at_every_turn(
    model: MambaLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(module, "IDLE_PASSES", 6)
    passes = recorded(model)
    short, middle, long = [[1] * 16], [[1] * 32], [[1] * 64]
    for parts in (short, short, middle, middle):
        passes.run(parts, None)
    for _ in range(3):
        for parts in (short, middle, long):  # all in use: nothing makes room
            passes.run(parts, None)
    assert {shape.tokens for shape in passes._recordings} == {16, 32} and passes.counts["recorded"] == 2
    for _ in range(6):
        passes.run(middle, None)
    passes.run(long, None)
    assert {shape.tokens for shape in passes._recordings} == {32, 64} and passes.counts["recorded"] == 3
    for _ in range(2):
        passes.run(long, None)
        passes.run(short, None)
    assert {shape.tokens for shape in passes._recordings} == {32, 64}
    passes.run(long, None)
    passes.run(short, None)
    assert {shape.tokens for shape in passes._recordings} == {64, 16} and passes.counts["recorded"] == 4


@torch.no_grad()
def test_more_rows_than_before_leave_earlier_recordings_their_memory(model: MambaLM) -> None:
    passes = recorded(model)
    parts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    first = [passes.run(parts[:count], None) for count in (1, 2, 3)]
    for _ in range(2):
        again = [passes.run(parts[:count], None) for count in (1, 2, 3)]
        for one, other in zip(first, again, strict=True):
            hold_equal(one, other)
    assert passes.counts == {"recorded": 3, "repeated": 6, "direct": 3}


@torch.no_grad()
def test_a_changed_model_is_recorded_anew(model: MambaLM) -> None:
    model = copy.deepcopy(model)
    passes, parts = recorded(model), [[5, 6, 7]]
    before = [passes.run(parts, None) for _ in range(2)][1]
    model.backbone.layers[1].mixer.A_log.add_(0.5)
    after = passes.run(parts, None)
    assert not passes._recordings
    hold_equal(after, passes.run(parts, None))
    assert passes.counts["recorded"] == 2 and passes._recordings
    hold_close(after, PromptPasses(model, model).run(parts, None))
    assert not torch.equal(after.logits, before.logits)
    handle = model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda *args: args[-1] * 2)
    hooked, counts = passes.run(parts, None), dict(passes.counts)
    hold_equal(hooked, PromptPasses(model, model).run(parts, None))
    assert not passes._recordings
    handle.remove()
    for _ in range(2):
        passes.run(parts, None)
    assert passes.counts["repeated"] == counts["repeated"] + 1


def test_gradients_autocast_and_other_models_are_read_as_they_are(model: MambaLM) -> None:
    passes = recorded(model)
    for _ in range(3):
        passes.run([[1, 2]], None)  # gradients are wanted
    around = PromptPasses(torch.nn.Sequential(model), model, recorder=FakeRecorder())
    off = PromptPasses(model, model, graphs=False, recorder=FakeRecorder())
    with torch.no_grad():
        assert not around._may_record() and not off._may_record() and passes._may_record()
        with torch.autocast("cpu", torch.bfloat16):
            assert not passes._may_record()
    assert passes.counts == {"recorded": 0, "repeated": 0, "direct": 3}


@pytest.mark.parametrize("options", [{}, {"prefix_cache_bytes": 1 << 22}, {"prefill_tokens": 24}], ids=str)
def test_an_engine_completes_prompts_as_without_recordings(
    model: MambaLM, tokenizer: Any, options: dict[str, int]
) -> None:
    texts = ["One, two, three, four", "One, two, ", "Nothing", "x" * 50, "One, two, three, five: "]
    params = [
        SamplingParams(max_new_tokens=9, n=1 + i % 2, temperature=i % 2, seed=i, prompt_logprobs=i == 2)
        for i in range(5)
    ]
    engine, plain = Engine(model, tokenizer, batch_size=4, **options), Engine(model, tokenizer, **options)
    engine._passes = recorded(model)
    for count in (5, 3, 5, 4, 5):
        got, want = engine.generate(texts[:count], params[:count]), plain.generate(texts[:count], params[:count])
        assert [[c.token_ids for c in row] for row in got] == [[c.token_ids for c in row] for row in want]
    state = [engine.prefill(texts[0]) for _ in range(3)][2]
    torch.testing.assert_close(state.ssm_state, plain.prefill(texts[0]).ssm_state, rtol=1e-4, atol=1e-4)
    assert engine._passes.counts["repeated"] >= 2
