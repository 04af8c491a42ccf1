"""The clients people have: ``openai`` and lm_eval's ``local-completions``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from mambacus.inference import SamplingParams
from mambacus.runtime.records import read_record
from mambacus.serving.answers import event
from mambacus.serving.schemas import ChatRequest

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(offline: Any, prompt: str, **changes: Any) -> Any:
    return offline.generate([prompt], SamplingParams(**changes))[0]


def test_completions_are_those_of_the_engine(client: Any, offline: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=[PROMPT, "The cat"], max_tokens=12, temperature=0)
    expected = [complete(offline, text, max_new_tokens=12)[0] for text in (PROMPT, "The cat")]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 24 and answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(offline.encode(PROMPT)) + len(offline.encode("The cat"))


def test_samples_follow_the_seed(client: Any, offline: Any) -> None:
    settings = {"max_tokens": 10, "temperature": 0.9, "top_p": 0.8, "n": 3, "seed": 5, "stop": ["."]}
    answer = client.completions.create(model="tiny", prompt=PROMPT, **settings)
    expected = complete(offline, PROMPT, max_new_tokens=10, temperature=0.9, top_p=0.8, n=3, seed=5, stop=["."])
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}
    free = [client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10).choices[0].text for _ in range(3)]
    assert len(set(free)) > 1  # without a seed every request has its own


def test_a_stream_is_the_text_in_pieces(client: Any, offline: Any) -> None:
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True}
    parts = list(client.completions.create(**settings, stream_options={"include_usage": True}))
    [expected] = complete(offline, PROMPT, max_new_tokens=30)
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected.text
    assert parts[-2].choices[0].finish_reason == "length" and len(parts) > 20
    assert parts[-1].usage.completion_tokens == 30 and not parts[-1].choices


def test_chat_goes_through_the_template(client: Any, offline: Any) -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": [{"type": "text", "text": "2+2"}]}]
    [expected] = complete(offline, "system: Add.\nuser: 2+2\nassistant:", max_new_tokens=9, stop=["\n\n"])
    settings = {"model": "tiny", "messages": turns, "max_completion_tokens": 9, "temperature": 0, "stop": "\n\n"}
    answer = client.chat.completions.create(**settings)
    assert answer.choices[0].message.content == expected.text and answer.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**settings, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts) == expected.text


def test_what_openai_lets_clients_leave_out_or_say(server: Any, offline: Any) -> None:
    """Null is the default, ``best_of`` may be ``n``, a developer is the system, and a name goes to the template."""
    url = f"{server.url}/v1"
    null = dict.fromkeys(
        ("max_tokens", "n", "best_of", "suffix", "stop", "temperature", "logit_bias", "stream_options")
    )
    [one] = httpx.post(f"{url}/completions", json={"prompt": PROMPT, "ignore_eos": True} | null).json()["choices"]
    assert one["finish_reason"] == "length"
    body = {"prompt": PROMPT, "temperature": 0, "n": 2, "best_of": 2, "suffix": ""}
    answer = httpx.post(f"{url}/completions", json=body).json()
    [expected] = complete(offline, PROMPT, max_new_tokens=16)
    assert [choice["text"] for choice in answer["choices"]] == [expected.text] * 2
    turns = [{"role": "developer", "content": "Add."}, {"role": "user", "content": "2+2", "name": "Ann"}]
    chat = httpx.post(f"{url}/chat/completions", json={"messages": turns, "temperature": 0, "max_tokens": 9}).json()
    [expected] = complete(offline, "system: Add.\nuser: 2+2\nassistant:", max_new_tokens=9)
    assert chat["choices"][0]["message"]["content"] == expected.text
    assert ChatRequest(messages=turns).messages[1].plain() == turns[1]


def test_the_usual_length_is_no_more_than_the_servers(start: Any) -> None:
    short = start(model="random:micro", most_new_tokens=5)
    answer = httpx.post(f"{short.url}/v1/completions", json={"prompt": "a", "ignore_eos": True}, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_an_event_is_one_line_for_every_client() -> None:
    text = "a\u2028b\x85c\n東京\x0b"
    data = event({"text": text})
    assert data.decode().splitlines() == [data.decode().rstrip("\n"), ""] and json.loads(data[6:]) == {"text": text}


def test_a_conversation_reads_only_what_is_new(server: Any, client: Any) -> None:
    turns = [{"role": "user", "content": "Tell me a long story about " + "a very old house and " * 8}]
    for turn in range(3):
        before = server.engine.stats.prompt_tokens
        answer = client.chat.completions.create(model="tiny", messages=turns, max_tokens=20, temperature=0)
        read = server.engine.stats.prompt_tokens - before
        if turn:  # the question, and at most the answer before, where its text is cut into other tokens than chosen
            assert read < 20 + 15 < answer.usage.prompt_tokens
        turns += [
            {"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": "More."},
        ]  # fmt: skip


def test_logprobs(client: Any, offline: Any) -> None:
    [expected] = complete(offline, PROMPT, max_new_tokens=4, logprobs=2, prompt_logprobs=True)
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    found = client.completions.create(**settings, echo=True).choices[0]
    values = [score.logprob for score in (*expected.prompt_logprobs[1:], *expected.logprobs)]
    assert found.text == PROMPT + expected.text
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    assert "".join(found.logprobs.tokens) == found.text
    streamed = [part.choices[0].logprobs for part in client.completions.create(**settings, stream=True)]
    plain = client.completions.create(**settings).choices[0].logprobs
    assert [place for part in streamed if part for place in part.text_offset] == plain.text_offset
    assert [value for part in streamed if part for value in part.token_logprobs] == pytest.approx(values[-4:], abs=1e-4)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content] == [2, 2, 2]


def test_a_prompt_can_be_scored_alone(client: Any) -> None:
    settings = {"model": "tiny", "prompt": [PROMPT, "The cat"], "echo": True, "temperature": 0, "logprobs": 1}
    more, alone = (client.completions.create(max_tokens=number, **settings) for number in (1, 0))
    for longer, choice in zip(more.choices, alone.choices, strict=True):
        assert choice.text == settings["prompt"][choice.index] and choice.finish_reason == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert len(getattr(choice.logprobs, name)) == len(getattr(longer.logprobs, name)) - 1 > 1
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(longer.logprobs.token_logprobs[1:-1], abs=1e-4)
    assert alone.usage.completion_tokens == 0 and alone.usage.total_tokens == alone.usage.prompt_tokens
    settings |= {"logprobs": None}
    assert [one.text for one in client.completions.create(max_tokens=0, **settings).choices] == settings["prompt"]


@pytest.mark.parametrize("prompt", ["naïve ï日😀 end", "ï日😀", "a<|endoftext|>日 b"])
def test_offsets_are_those_of_the_text(client: Any, prompt: str) -> None:
    """A token begins where its text does, part of a character where the character does."""
    settings = {"model": "tiny", "max_tokens": 1, "temperature": 0, "logprobs": 0}
    found = client.completions.create(prompt=prompt, echo=True, **settings).choices[0]
    assert max(found.logprobs.text_offset) < len(found.text) and found.logprobs.text_offset[0] == 0
    for token, place in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        whole = token.rstrip("\ufffd")
        assert found.text[place : place + len(whole)] == whole, (token, place)
        assert whole or found.text[place] in "ï日😀"


def test_offsets_go_on_through_a_stream_within_a_character(offline: Any) -> None:
    from mambacus.serving.answers import Places

    ids = offline.encode("ï日😀 b")
    text = offline.tokenizer.decode(ids)
    whole = Places(offline.tokenizer).take(ids)
    piecewise = Places(offline.tokenizer)
    assert [piecewise.take([token])[0] for token in ids] == whole
    assert whole == sorted(whole) and len(ids) > len(text) - 1
    assert set(whole) == {text.index(letter) for letter in "ï日😀"} | {3}


def test_parts_of_characters_have_no_bytes_of_their_own(client: Any, offline: Any) -> None:
    ids = offline.encode("東")
    assert len(ids) > 1  # no token of `tiny` is the whole character
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1, logprobs=True, temperature=0,
        logit_bias={ids[0]: 100},
    )  # fmt: skip
    [score] = answer.choices[0].logprobs.content
    assert score.token == "\ufffd" and score.bytes is None


def test_models_health_and_metrics(server: Any, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    missing = httpx.get(f"{server.url}/v1/models/some/other").json()["error"]
    assert "model 'some/other': not served here" in missing["message"] and missing["code"] == "model_not_found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values['mambacus_requests_total{path="/v1/models",status="200"}']) >= 1
    assert int(values["mambacus_time_to_first_token_seconds_count"]) >= 1
    assert int(values["mambacus_generated_tokens_total"]) > 0 and values["mambacus_completions_unfinished"] == "0"
    described = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(name.split("{")[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") in described
               for name in values)  # fmt: skip


def test_lm_eval_gets_the_scores_and_texts_of_the_harness(server: Any, offline: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from mambacus.evals.harness import MambacusLM
    from mambacus.models.registry import resolve

    pairs = [(PROMPT, " He has 7 apples."), ("The cat sat on the", " mat"), ("One, two,", " three")]
    folder = str(resolve("tiny").folder)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=folder, tokenizer_backend="huggingface",
        num_concurrent=2,
    )  # fmt: skip
    ours = MambacusLM(offline.model, offline.tokenizer)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (score, greedy), (expected, also) in zip(theirs.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert score == pytest.approx(expected, abs=1e-3) and greedy == also
    until = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 8}), i)
             for i, (text, _) in enumerate(pairs)]  # fmt: skip
    assert theirs.generate_until(until) == ours.generate_until(until)


async def _stream_all(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await asyncio.gather(*(_stream(http, body) for body in bodies))


async def _stream(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    text = ""
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                part = json.loads(line.removeprefix("data: "))
                assert "error" not in part, part
                text += part["choices"][0]["text"]
    return text


def bodies(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return requests of many kinds; each names its seed."""
    return [
        {
            "prompt": f"Question: Anna has {i + seed} coins and {'very ' * (i % 17)}many friends.\nAnswer:",
            "max_tokens": 4 + i % 20,
            "temperature": [0, 0.7, 1.1][i % 3],
            "top_p": [1, 0.9][i % 2],
            "seed": seed + i,
        }
        for i in range(count)
    ]


def expected_texts(offline: Any, asked: list[dict[str, Any]]) -> list[str]:
    params = [
        SamplingParams(
            max_new_tokens=one["max_tokens"], temperature=one["temperature"], top_p=one["top_p"], seed=one["seed"]
        )
        for one in asked
    ]
    return [row[0].text for row in offline.generate([one["prompt"] for one in asked], params)]


def test_64_streams_at_once_each_get_their_own_text(server: Any, offline: Any) -> None:
    asked = bodies(64)
    assert asyncio.run(_stream_all(server.url, asked)) == expected_texts(offline, asked)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_64_streams_for_minutes(tmp_path: Path) -> None:
    """The soak of ``benchmarks/serve_soak.py``: no error, no wrong text, flat memory, and a record of it."""
    script = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
    seconds = os.environ.get("MAMBACUS_SOAK_SECONDS", "300")
    command = [sys.executable, str(script), "--out", str(tmp_path / "soak.json"), "--seconds", seconds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    results = read_record(tmp_path / "soak.json").results
    assert results["errors"] == {} and results["wrong_texts"] == 0 and results["requests"] > 64
    assert results["first_token_seconds"]["p99"] > 0 < results["memory_bytes"]["peak"]
