"""Where engines go wrong: extreme parameters, ends that coincide, prompts given up, neighbours of very long prompts."""

from __future__ import annotations

import dataclasses
from array import array
from itertools import chain
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mambacus.inference import Completion, Engine, Piece, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.inference.sampling import choose_tokens
from mambacus.inference.scheduler import Scheduler, _wants_every_step
from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError

END = "<|endoftext|>"
LONG = "a very long prompt, " * 40  # 800 tokens of one byte
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def alone(model: MambaLM, tokenizer: Any, prompt: Any, params: SamplingParams = GREEDY) -> list[Completion]:
    return Engine(model, tokenizer).generate([prompt], params)[0]


# Parameters


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-40, 1e-20, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_tiny_temperature_is_greedy(temperature: float, scale: float) -> None:
    logits = scale * torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    draws = torch.linspace(0, 0.999999, 50, dtype=torch.float64)
    for more in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
        got = choose_tokens(logits, SamplingParams(temperature=temperature, **more), draws)
        assert got.tolist() == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_uniform_and_filters_still_hold() -> None:
    logits = torch.arange(8.0).expand(8000, 8)
    draws = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    tokens = choose_tokens(logits, SamplingParams(temperature=1e30), draws)
    assert chisquare(torch.bincount(tokens, minlength=8)).pvalue > 1e-4
    tokens = choose_tokens(logits, SamplingParams(temperature=1e30, top_k=1), draws)
    assert set(tokens.tolist()) == {7}
    assert set(choose_tokens(logits, SamplingParams(temperature=1.0, min_p=1.0), draws).tolist()) == {7}


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_penalties_and_biases_give_numbers(penalty: float, temperature: float) -> None:
    logits = torch.cat([torch.randn(4, 9), torch.zeros(4, 1)], 1)
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, logit_bias=dict.fromkeys(range(10), -1e6)
    )
    draws = torch.full((4,), 0.5, dtype=torch.float64)
    seen = torch.ones(4, 10, dtype=torch.bool)
    assert (choose_tokens(logits, params, draws, seen) >= 0).all()


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}, {"logit_bias": {1: 1e300}}]
)
def test_what_float32_cannot_hold_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_penalties_may_know_the_tokens_behind_a_state(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=10, repetition_penalty=8.0, ignore_eos=True)
    text, engine = "One, two, three, four: ", Engine(model, tokenizer)
    state, ids = engine.prefill(text[:11]), engine.encode(text[:11])
    expected = engine.generate([text], params)
    assert engine.generate([text[11:]], params, state, state_ids=ids) == expected
    liked = expected[0][0].token_ids[0]
    assert engine.generate([text[11:]], params, state, state_ids=[liked])[0][0].token_ids[0] != liked


# Ends


def test_a_special_token_may_be_a_stop_string(model: MambaLM, tokenizer: Any) -> None:
    texts = alone(model, tokenizer, "abc", SamplingParams(max_new_tokens=3, ignore_eos=True))[0]
    bias = {0: 1000.0}  # the end of the text is always the likeliest
    for ignore in (False, True):
        params = SamplingParams(max_new_tokens=5, stop=[END, "zz"], ignore_eos=ignore, logit_bias=bias)
        [found] = alone(model, tokenizer, "abc", params)
        assert (found.text, found.token_ids) == ("", [0])
        assert found.finish_reason == ("stop" if ignore else "eos")
    unstopped = SamplingParams(max_new_tokens=3, stop=[END], ignore_eos=True)
    assert alone(model, tokenizer, "abc", unstopped)[0].text == texts.text
    with pytest.raises(UserError, match="holds the special token"):
        alone(model, tokenizer, "abc", SamplingParams(stop=["\n" + END]))


def test_completions_may_be_empty(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=5, n=3, temperature=1.0, logprobs=2, logit_bias={0: 1000.0}, stop=["x"])
    engine = Engine(model, tokenizer, batch_size=2, prefix_cache_bytes=1 << 22)
    for _ in range(2):  # the second time from the cache
        found = engine.generate(["abc"], params, keep_state=True)[0]
        assert [(one.text, one.token_ids, one.finish_reason) for one in found] == [("", [0], "eos")] * 3
        assert all(one.logprobs is not None and len(one.logprobs[0].top) == 2 for one in found)
        assert all(one.state is not None and one.state.tokens.tolist() == [3] for one in found)
    pieces = list(engine.stream(["abc"], params))
    assert len(pieces) == 3 and all(piece.text == "" and piece.completion is not None for piece in pieces)


def test_ends_that_coincide(model: MambaLM, tokenizer: Any) -> None:
    [whole] = alone(model, tokenizer, "abc", SamplingParams(max_new_tokens=40, ignore_eos=True))
    length = next(n for n in range(5, 40) if "\ufffd" not in tokenizer.decode(whole.token_ids[n - 1 : n]))
    text = tokenizer.decode(whole.token_ids[:length])
    stop = text[-1]
    first = text.index(stop)
    params = SamplingParams(max_new_tokens=length, stop=[stop], ignore_eos=True)
    [found] = alone(model, tokenizer, "abc", params)
    assert (found.finish_reason, found.text) == ("stop", text[:first])  # also with the last token allowed


def test_samples_with_scores_are_the_first_ones_of_more(model: MambaLM, tokenizer: Any) -> None:
    def ask(n: int, batch_size: int) -> list[Completion]:
        params = SamplingParams(max_new_tokens=6, temperature=1.2, n=n, logprobs=1, seed=3, ignore_eos=True)
        return Engine(model, tokenizer, batch_size=batch_size).generate(["abc", LONG], params)[0]

    many = ask(9, 4)
    for one, other in zip(ask(2, 16), many, strict=False):
        assert one.token_ids == other.token_ids and one.logprobs is not None and other.logprobs is not None
        assert [s.logprob for s in one.logprobs] == pytest.approx([s.logprob for s in other.logprobs], abs=1e-4)
        assert [score.token_id for score in one.logprobs] == one.token_ids


# Blocks of tokens, as on a GPU


def test_looking_at_tokens_in_blocks_changes_nothing(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} and {i * i}" for i in range(9)]
    params = [
        SamplingParams(
            max_new_tokens=1 + 5 * i % 23, temperature=[0.0, 1.0, 0.7][i % 3], seed=i, n=1 + i % 2,
            stop=["e"] if i % 4 == 1 else [], repetition_penalty=1.3 if i % 5 == 2 else 1.0,
        )
        for i in range(9)
    ]  # fmt: skip
    params += [SamplingParams(max_new_tokens=9, logprobs=1), SamplingParams(max_new_tokens=1, logprobs=0)]
    params.append(SamplingParams(max_new_tokens=40, temperature=1.0, stop=list(ascii_letters), n=3))
    texts += ["scored", "scored too", "stopped"]
    expected = Engine(model, tokenizer, batch_size=4).generate(texts, params)
    run_ahead(monkeypatch)
    for batch_size in (3, 4):
        engine = Engine(model, tokenizer, batch_size=batch_size)
        for found, wanted in zip(chain(*engine.generate(texts, params)), chain(*expected), strict=True):
            assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
            assert found.finish_reason == wanted.finish_reason
            scores = [[score.token_id for score in one.logprobs or []] for one in (found, wanted)]
            assert scores[0] == scores[1]
        assert engine.stats.generated_tokens == sum(len(one.token_ids) for one in chain(*expected))
    assert {one.finish_reason for one in chain(*expected)} == {"length", "stop", "eos"}


def run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let schedulers queue tokens on a CPU as on a GPU."""
    monkeypatch.setattr(Scheduler, "_runs_ahead", lambda self: not any(map(_wants_every_step, self._rows)))


def test_rows_of_one_rule_follow_and_others_are_chosen_step_by_step(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch)
    followed = []
    follow = Decoder.follow
    monkeypatch.setattr(
        Decoder, "follow", lambda self, tokens, count, *how: followed.append(count) or follow(self, tokens, count, *how)
    )
    plain = SamplingParams(max_new_tokens=20, ignore_eos=True)
    for params, cache, counts in (
        (plain, 0, [7, 7, 3]),
        (plain, 1 << 22, [7, 7, 3]),  # its state is wanted at its end, not on the way
        ([plain, dataclasses.replace(plain, max_new_tokens=11)], 0, [7, 7, 3]),
        ([plain, dataclasses.replace(plain, max_new_tokens=11)], 1 << 22, [7, 3]),
        (dataclasses.replace(plain, temperature=1.0), 0, [7, 7, 3]),
        (dataclasses.replace(plain, temperature=1.0, top_p=0.9, logit_bias={70: 2.0}), 0, [7, 7, 3]),
        (dataclasses.replace(plain, repetition_penalty=1.2), 0, []),
        ([dataclasses.replace(plain, repetition_penalty=one) for one in (1.2, 1.5)], 0, []),
        (dataclasses.replace(plain, repetition_penalty=1.5, temperature=1.0), 0, []),
        ([plain, dataclasses.replace(plain, temperature=1.0)], 0, []),
    ):
        followed.clear()
        engine = Engine(model, tokenizer, batch_size=2, prefix_cache_bytes=cache)
        texts = ["abc", "defg"]
        found = engine.generate(texts, params)
        assert followed == counts
        ones = params if isinstance(params, list) else [params, params]
        for text, one, [completion] in zip(texts, ones, found, strict=True):
            [[alone]] = Engine(model, tokenizer).generate([text], one)
            assert completion.token_ids == alone.token_ids


def test_a_row_that_ends_is_not_looked_at_again(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch)
    engine = Engine(model, tokenizer, batch_size=3, prefix_cache_bytes=1 << 22)
    scheduler = engine.scheduler()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    requests = engine.requests(["abc", "defg", "hi", "jk"], params, stream=True)
    for request in requests:
        scheduler.submit(request)
    pieces = run(scheduler, 2)
    assert {(piece.prompt, len(piece.token_ids)) for piece in pieces} == {(0, 8), (1, 8), (2, 8)}
    requests[1].cancelled = True  # with eight more tokens queued
    pieces += run(scheduler)
    assert scheduler.active == 3  # two of them, and the one that waited
    requests[0].cancelled = True  # all of its tokens are queued
    pieces += run(scheduler, 10)
    assert not scheduler.active and not scheduler.waiting
    ends = {piece.prompt: piece.completion for piece in pieces if piece.completion is not None}
    assert len([piece for piece in pieces if piece.completion is not None]) == 4
    assert [(ends[i].finish_reason, len(ends[i].token_ids)) for i in range(4)] == [
        ("cancelled", 16), ("cancelled", 8), ("length", 20), ("length", 20),
    ]  # fmt: skip
    for number, text in enumerate(("abc", "defg", "hi", "jk")):
        expected = Engine(model, tokenizer).generate([text], params)[0][0].token_ids
        found = [token for piece in pieces if piece.prompt == number for token in piece.token_ids]
        assert found == ends[number].token_ids == expected[: len(found)]
    # a completion of full length is remembered for prompts that go on from it
    before = engine.stats.prompt_tokens
    again = [*tokenizer("hi")["input_ids"], *ends[2].token_ids, 65]
    [[more]] = engine.generate([again], params)
    assert engine.stats.prompt_tokens - before == 2
    assert more.token_ids == Engine(model, tokenizer).generate([again], params)[0][0].token_ids


def test_states_wanted_stop_the_running_ahead(model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ahead(monkeypatch)
    engine = Engine(model, tokenizer, batch_size=3)
    scheduler = engine.scheduler()
    scheduler.submit(engine.requests(["abc"], SamplingParams(max_new_tokens=30, ignore_eos=True))[0])
    pieces = run(scheduler)
    [kept] = engine.requests(["de"], SamplingParams(max_new_tokens=5, ignore_eos=True), keep_state=True)
    kept.number = 1
    scheduler.submit(kept)
    pieces += run(scheduler, 30)
    ends = {piece.prompt: piece.completion for piece in pieces}
    for number, (text, count) in enumerate((("abc", 30), ("de", 5))):
        params = SamplingParams(max_new_tokens=count, ignore_eos=True)
        assert ends[number].token_ids == Engine(model, tokenizer).generate([text], params)[0][0].token_ids
    assert ends[1].state.tokens.item() == 2 + 4
    assert not scheduler.active


# Prompts


def test_an_array_is_a_prompt(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=6, temperature=1.0, repetition_penalty=1.2, seed=5)
    ids = tokenizer(LONG)["input_ids"]
    for limits in ({"prefill_tokens": 100}, {"prefix_cache_bytes": 1 << 22}):
        engine = Engine(model, tokenizer, **limits)
        assert engine.generate([array("q", ids)], params) == engine.generate([ids], params)
    with pytest.raises(UserError, match="token id 900"):
        engine.generate([array("q", [900])], params)
    assert engine.generate([array("q")], params) == engine.generate([""], params)


def run(scheduler: Scheduler, steps: int = 1) -> list[Piece]:
    return [piece for _ in range(steps) for piece in scheduler.step()]


def test_a_prompt_is_given_up_between_chunks_also_when_nothing_else_happens(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, prefill_tokens=16)
    scheduler = engine.scheduler()
    [request] = engine.requests([LONG], GREEDY)
    scheduler.submit(request)
    assert run(scheduler, 3) == [] and engine.stats.prompt_tokens == 48 and scheduler.waiting == 1
    request.cancelled = True
    [piece] = run(scheduler)
    assert piece.completion == Completion("", [], "cancelled")
    assert engine.stats.prompt_tokens == 48 and not scheduler.waiting and not scheduler.active


@pytest.mark.parametrize("cancel", [False, True])
def test_a_short_prompt_does_not_wait_for_a_long_one(model: MambaLM, tokenizer: Any, cancel: bool) -> None:
    engine = Engine(model, tokenizer, prefill_tokens=16, batch_size=4, prefix_cache_bytes=1 << 22)
    scheduler = engine.scheduler()
    long, short, other = engine.requests([LONG, "abc", "defgh"], GREEDY)
    scheduler.submit(long)
    run(scheduler, 4)
    for request in (short, other):
        scheduler.submit(request)
    ends: dict[int, Completion | None] = {}
    for _ in range(20):
        ends |= {piece.prompt: piece.completion for piece in scheduler.step()}
    assert ends[1] == alone(model, tokenizer, "abc")[0] and ends[2] == alone(model, tokenizer, "defgh")[0]
    assert 0 not in ends and engine.stats.prompt_tokens < 450
    long.cancelled = cancel
    for _ in range(80):
        ends |= {piece.prompt: piece.completion for piece in scheduler.step()}
    if cancel:
        assert ends[0] == Completion("", [], "cancelled") and engine.stats.prompt_tokens < 450
    else:
        assert ends[0] == alone(model, tokenizer, LONG)[0]
        assert engine.stats.prompt_tokens == len(LONG) + 3 + 5  # nothing was read twice
    assert not scheduler.active and not scheduler.waiting


def test_a_stream_of_short_prompts_does_not_starve_a_long_one(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, prefill_tokens=16, batch_size=4)
    scheduler = engine.scheduler()
    [long] = engine.requests([LONG], GREEDY)
    scheduler.submit(long)
    done, steps = False, 0
    while not done:
        for request in engine.requests(["xyz"] * 2, SamplingParams(max_new_tokens=2, ignore_eos=True)):
            request.number = 1
            scheduler.submit(request)
        done = any(piece.prompt == 0 for piece in scheduler.step())
        steps += 1
        assert steps < 8 * len(LONG) / 16


def test_states_and_the_prefix_cache_side_by_side(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, prefix_cache_bytes=1 << 22, batch_size=3)
    prefix, texts = "You are a calculator. ", ["7 + 8 = ? Answer briefly.", "12 apples and 3 pears are"]
    params = SamplingParams(max_new_tokens=5, temperature=0.8, n=4, seed=2, ignore_eos=True)
    state = engine.prefill(prefix)
    plain = Engine(model, tokenizer)
    for _ in range(2):
        assert engine.generate(texts, params) == plain.generate(texts, params)
        assert engine.generate(texts, params, state) == plain.generate(texts, params, state)
    assert engine.prefix_cache is not None and engine.prefix_cache.hits == 2


def test_nan_of_one_row_of_many_leaves_the_rest(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, batch_size=3)
    params = SamplingParams(max_new_tokens=6, temperature=1.0, top_p=0.9, n=3, ignore_eos=True)
    good, bad = engine.prefill("abc"), engine.prefill("abc")
    bad.ssm_state[:] = float("inf")
    expected = engine.generate(["d"], params, good)[0]
    pieces = list(engine.stream(["d", "d", "d"], params, type(good).cat([good, bad, good])))
    failed = [piece for piece in pieces if piece.error]
    assert [(piece.prompt, piece.sample) for piece in failed] == [(1, 0), (1, 1), (1, 2)]
    for prompt in (0, 2):
        ends = {piece.sample: piece.completion for piece in pieces if piece.prompt == prompt and piece.completion}
        assert [ends[n] and ends[n].token_ids for n in range(3)] == [one.token_ids for one in expected]


@pytest.mark.parametrize(
    "prompt",
    [(5, 0, 7), b"\x05\x00\x07", bytearray(b"\x05\x00\x07"), np.array([5, 0, 7], np.uint8), torch.tensor([5, 0, 7]),
     [5.0, 0.0, 7.0], (float(n) for n in (5, 0, 7)), (n for n in (5, 0.0, 7)), array("q", [5, 0, 7]),
     array("i", [5, 0, 7]), [np.int64(5), False, 7]],
    ids=lambda prompt: type(prompt).__name__,
)  # fmt: skip
def test_whole_numbers_of_any_kind_are_a_prompt(model: MambaLM, prompt: Any) -> None:
    found = Engine(model).encode(prompt)
    assert found == [5, 0, 7] and {*map(type, found)} == {int}


@pytest.mark.parametrize("prompt", [[1e30], [1.0, 2**70], (n for n in (1, 2**70)), [-(2**70)], [3, 900], [-1]], ids=str)
def test_a_number_that_is_no_token_is_named(model: MambaLM, prompt: Any) -> None:
    with pytest.raises(UserError, match=r"token id -?\d+: the model's vocabulary has \d+ tokens"):
        Engine(model).encode(prompt)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), "x", torch.tensor([1, 2])], ids=str)
def test_what_is_no_whole_number_is_no_token(model: MambaLM, number: Any) -> None:
    with pytest.raises(UserError, match="expected token ids, got"):
        Engine(model).encode([1, number])


def test_an_engine_first_used_in_inference_mode_works_outside(model: MambaLM) -> None:
    engine = Engine(model, batch_size=2)
    with torch.inference_mode():
        inside = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=8))
    assert engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=8)) == inside
