"""A server that begins every request from a state: a compiled prompt that no client sends and no request reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mambacus.cli import main
from mambacus.inference import SamplingParams

PREFIX = "Question: Ann has 2 pens and finds 3 more. How many pens does she have?\nAnswer: 2 + 3 = 5\n\n"
TEXTS = ["Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:", "The cat"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, offline: Any) -> Path:
    from mambacus.models.state_files import StateFile, write_state

    path = tmp_path_factory.mktemp("state") / "prompt.state"
    ids = offline.encode(PREFIX)
    write_state(path, StateFile(offline.prefill(ids), tuple(ids)), offline.model, offline.tokenizer)
    return path


@pytest.fixture(scope="module")
def primed(start: Callable[..., Any], state: Path, template: Path) -> Any:
    return start(state=state, chat_template=template)


def post(server: Any, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/{path}", json={"temperature": 0, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_completions_and_chats_begin_from_it(primed: Any, offline: Any, state: Path) -> None:
    params = SamplingParams(max_new_tokens=12)
    before = primed.engine.stats.prompt_tokens
    answer = post(primed, "completions", prompt=TEXTS, max_tokens=12)
    prefix = offline.encode(PREFIX)
    ids = [offline.encode(text) for text in TEXTS]
    expected = offline.generate([prefix + one for one in ids], params)
    assert [choice["text"] for choice in answer["choices"]] == [row[0].text for row in expected]
    alone = [row[0].text for row in offline.generate(ids, params)]
    assert alone != [row[0].text for row in expected]  # the state does matter
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) == primed.engine.stats.prompt_tokens - before
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    messages = [{"role": "user", "content": "2+2"}]
    chat = post(primed, "chat/completions", messages=messages, max_tokens=9)
    [[expected_chat]] = offline.generate(
        [prefix + offline.encode("user: 2+2\nassistant:")], SamplingParams(max_new_tokens=9)
    )
    assert chat["choices"][0]["message"]["content"] == expected_chat.text
    assert f"mambacus_state_tokens {len(prefix)}\n" in httpx.get(f"{primed.url}/metrics").text


def test_the_prefix_cache_works_behind_it(primed: Any, offline: Any) -> None:
    text = "Once upon a time there was a very old house with many rooms in it and"
    first, again = (post(primed, "completions", prompt=text, max_tokens=8) for _ in range(2))
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    tokens = first["usage"]["prompt_tokens"]
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, again)] == [0, tokens]
    longer = post(primed, "completions", prompt=text + first["choices"][0]["text"] + " so", max_tokens=4)
    assert longer["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens


def test_an_empty_prompt_has_nothing_to_go_on_with(primed: Any) -> None:
    answer = httpx.post(f"{primed.url}/v1/completions", json={"prompt": ""})
    assert answer.status_code == 400 and "empty prompt cannot follow a state" in answer.json()["error"]["message"]


def test_a_state_of_another_model_is_refused(state: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--model", "random:micro", "--state", str(state), "--port", "0"]) == 2
    assert f"--state {state}: of another model" in capsys.readouterr().err
    assert main(["serve", "--model", "tiny", "--state", str(tmp_path / "gone"), "--port", "0"]) == 2
    assert "cannot read the state" in capsys.readouterr().err
