"""Continuous batching: who is in the batch, what arrives when, and that nothing of it shows in the text."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import pytest
import torch

from mambacus.inference import Completion, Engine, Piece, SamplingParams
from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError

TEXTS = [f"{i} times {i + 3} is " + "ab " * random.Random(i).randrange(12) for i in range(14)]


def mixed(count: int) -> list[SamplingParams]:
    """Return parameters that all differ in length, rule and what they ask for."""
    changes: list[dict[str, Any]] = [
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9}, {"repetition_penalty": 1.4}, {"logprobs": 2},
        {"logit_bias": {65: 9.0}}, {"stop": ["e", "qq"]}, {"temperature": 1.2, "top_p": 0.9, "n": 3},
        {"prompt_logprobs": True},
    ]  # fmt: skip
    rng = random.Random(1)
    return [
        SamplingParams(**{"max_new_tokens": rng.randrange(1, 30), "seed": i} | changes[i % len(changes)])
        for i in range(count)
    ]


def count_forwards(model: MambaLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    def counting(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return shapes


def test_requests_of_all_kinds_together_give_what_each_gives_alone(model: MambaLM, tokenizer: Any) -> None:
    params = mixed(len(TEXTS))
    alone = [
        Engine(model, tokenizer, batch_size=4).generate([text], one)[0] for text, one in zip(TEXTS, params, strict=True)
    ]
    for limits in ({"batch_size": 64}, {"batch_size": 3, "prefill_tokens": 8}, {"batch_size": 5, "prefill_tokens": 1}):
        together = Engine(model, tokenizer, **limits).generate(TEXTS, params)
        for one, other in zip(chain(*alone), chain(*together), strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
                assert (mine is None) == (theirs is None)
                for a, b in zip(mine or [], theirs or [], strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or (a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4)


def test_waiting_prompts_take_the_place_of_rows_that_end(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [SamplingParams(max_new_tokens=4 + 9 * (i % 3), ignore_eos=True) for i in range(14)]
    shapes = count_forwards(model, monkeypatch)
    Engine(model, tokenizer, batch_size=4).generate(TEXTS, params)
    widths = [rows for rows, tokens in shapes if tokens == 1]
    assert sum(widths) == sum(one.max_new_tokens - 1 for one in params)
    assert len(widths) <= 50  # 4 batches that each wait for their longest row would take 84


def test_a_long_prompt_does_not_stop_the_rows(model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_forwards(model, monkeypatch)
    engine = Engine(model, tokenizer, batch_size=4, prefill_tokens=16)
    scheduler = engine.scheduler()
    [short] = engine.requests(["abc"], SamplingParams(max_new_tokens=40, ignore_eos=True))
    scheduler.submit(short)
    scheduler.step()
    [long] = engine.requests(["x" * 320], SamplingParams(max_new_tokens=2))
    scheduler.submit(long)
    shapes.clear()
    for _ in range(10):
        scheduler.step()
    assert shapes == [(1, 16), (1, 1)] * 10  # a chunk, a token, a chunk, a token


def test_memory_for_reading_does_not_grow_with_the_prompt(
    model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = count_forwards(model, monkeypatch)
    read: list[int] = []
    engine = Engine(model, tokenizer, prefill_tokens=64)
    engine.on_read = read.append
    whole = engine.prefill("0123456789" * 500)
    engine.generate([[48 + i % 10 for i in range(3000)]], SamplingParams(max_new_tokens=1))
    assert whole.tokens.tolist() == [5000]
    assert max(rows * tokens for rows, tokens in shapes) == 64
    assert sum(read) == 8000 == engine.stats.prompt_tokens


def test_64_samples_cost_one_reading(model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_forwards(model, monkeypatch)
    engine = Engine(model, tokenizer, batch_size=64)
    [found] = engine.generate(["x" * 512], SamplingParams(n=64, temperature=1.0, max_new_tokens=5, ignore_eos=True))
    assert engine.stats.prompt_tokens == 512 and [s for s in shapes if s[1] > 1] == [(1, 512)]
    assert len({completion.text for completion in found}) > 32


@pytest.mark.parametrize("stop", [(), ("e",), ("ab", "b"), ("\n\n", "é")])
def test_the_pieces_of_a_stream_are_the_text(model: MambaLM, tokenizer: Any, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=1.5, n=2, stop=stop, ignore_eos=True)
    expected = Engine(model, tokenizer).generate(TEXTS, params)
    engine = Engine(model, tokenizer, batch_size=6)
    texts: dict[tuple[int, int], list[Piece]] = {}
    for piece in engine.stream(TEXTS, params):
        texts.setdefault((piece.prompt, piece.sample), []).append(piece)
    for (prompt, sample), pieces in texts.items():
        whole = expected[prompt][sample]
        assert pieces[-1].completion == whole and all(piece.completion is None for piece in pieces[:-1])
        assert "".join(piece.text for piece in pieces) == whole.text
        assert list(chain(*(piece.token_ids for piece in pieces))) == whole.token_ids
        assert len(pieces) == len(whole.token_ids)
    assert len(texts) == 2 * len(TEXTS)


def test_what_is_cancelled_ends_and_the_rest_goes_on(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    expected = Engine(model, tokenizer).generate(TEXTS[:6], params)
    engine = Engine(model, tokenizer, batch_size=3)
    scheduler = engine.scheduler()
    requests = engine.requests(TEXTS[:6], params)
    for request in requests:
        scheduler.submit(request)
    ends: dict[int, Completion | None] = {}
    for step in range(60):
        if step == 3:
            requests[1].cancelled = requests[5].cancelled = True  # one being decoded, one that waits
        ends |= {piece.prompt: piece.completion for piece in scheduler.step()}
    assert not scheduler.active and not scheduler.waiting
    for number in (0, 2, 3, 4):
        assert ends[number] == expected[number][0]
    cut = ends[1]
    assert cut is not None and cut.finish_reason == "cancelled" and 0 < len(cut.token_ids) < 12
    assert cut.token_ids == expected[1][0].token_ids[: len(cut.token_ids)]
    assert ends[5] == Completion("", [], "cancelled")


def test_a_long_prompt_is_given_up_between_chunks(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, prefill_tokens=10)
    scheduler = engine.scheduler()
    requests = engine.requests(["abc", "y" * 1000], SamplingParams(max_new_tokens=200, ignore_eos=True))
    scheduler.submit(requests[0])
    scheduler.step()
    scheduler.submit(requests[1])
    scheduler.step()
    requests[1].cancelled = True
    pieces = scheduler.step()
    assert [(p.prompt, p.completion.finish_reason) for p in pieces if p.completion] == [(1, "cancelled")]
    assert engine.stats.prompt_tokens < 30


def test_leaving_a_stream_gives_the_rest_up(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    stream = engine.stream(["abc"], SamplingParams(max_new_tokens=1000, ignore_eos=True))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert engine.stats.generated_tokens < 3
    assert engine.generate(["abc"], SamplingParams(max_new_tokens=3))[0][0].token_ids  # the rows are free again


def test_two_streams_of_one_engine_do_not_mix(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engine = Engine(model, tokenizer)
    expected = [engine.generate([text], params)[0][0] for text in TEXTS[:2]]
    first, second = (engine.stream([text], params) for text in TEXTS[:2])
    ends = [piece.completion for pair in zip(first, second, strict=True) for piece in pair if piece.completion]
    assert ends == expected


def test_logprobs_are_those_of_the_model(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(
        max_new_tokens=6, logprobs=3, prompt_logprobs=True, temperature=0.7, logit_bias={70: 2.0}, ignore_eos=True
    )
    [[completion]] = Engine(model, tokenizer, prefill_tokens=5).generate(["One, two, three"], params)
    ids = tokenizer("One, two, three")["input_ids"] + completion.token_ids
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    assert completion.prompt_logprobs is not None and completion.logprobs is not None
    assert completion.prompt_logprobs[0] is None
    scores = completion.prompt_logprobs[1:] + completion.logprobs
    assert [score.token_id for score in scores if score] == ids[1:]
    for score, row in zip(scores, expected, strict=True):
        assert score is not None and score.logprob == pytest.approx(row[score.token_id].item(), abs=1e-4)
        best, places = row.topk(3)
        assert [token for token, _ in score.top] == places.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.tolist(), abs=1e-4)


def test_a_completion_carries_its_state(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    longer = SamplingParams(max_new_tokens=9, ignore_eos=True)
    whole = [found.token_ids for [found] in engine.generate(TEXTS[:3], longer)]
    parts = engine.generate(TEXTS[:3], params, keep_state=True)
    for text, tokens, [part] in zip(TEXTS, whole, parts, strict=False):
        assert part.state is not None and part.state.tokens.tolist() == [len(text) + 4]
        [[rest]] = engine.generate([part.token_ids[-1:]], SamplingParams(max_new_tokens=4, ignore_eos=True), part.state)
        assert part.token_ids + rest.token_ids == tokens


def test_nan_is_an_error_of_its_request_alone(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_new_tokens=4)
    good, bad = engine.prefill("abc"), engine.prefill("abc")
    bad.ssm_state[:] = float("nan")
    [[expected]] = engine.generate(["d"], params, good)
    ends = list(engine.stream(["d", "d"], params, type(good).cat([bad, good])))
    errors = [piece.error for piece in ends if piece.prompt == 0]
    assert len(errors) == 1 and "NaN" in str(errors[0])
    assert ends[-1].completion == expected
    with pytest.raises(UserError, match="logits are NaN"):
        engine.generate(["d"], params, bad)


def test_faults_of_parameters_are_named(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="logit_bias: token id 900"):
        engine.generate(["a"], SamplingParams(logit_bias={900: 1.0}))
    with pytest.raises(UserError, match="expected one or 2, one for each prompt, got 1"):
        engine.generate(["a", "b"], [SamplingParams()])
