"""What must not get through: wrong, oversized, slow and surplus requests, wrong keys; and how the server ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mambacus.cli import main
from mambacus.runtime.errors import UserError

LONG = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", b"{", "body: not JSON: Expecting property name enclosed in double quotes at character 1"),
        ("completions", b'{"prompt": "a",\n "n": }', "body: not JSON: Expecting value at character 22"),
        ("completions", b"\xff", "body"),
        ("completions", b"[]", "body"),
        ("completions", b"[" * 40_000, ""),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [4096]}, "token id 4096"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", b'{"prompt": "\\ud800"}', "surrogate"),
        ("completions", b'{"prompt": "a", "\\ud800": 1}', "unicode"),
        ("completions", b'{"prompt": "a", "temperature": NaN}', "temperature"),
        ("completions", b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        ("completions", {"prompt": "a", "temprature": 1}, "temprature"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p"),
        ("completions", {"prompt": "a", "n": 10**9}, "n"),
        ("completions", {"prompt": ["a"] * 100, "n": 100}, "completions"),
        ("completions", {"prompt": "a", "max_tokens": 65}, "max_tokens: expected at most 64, got 65"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a b " * 600}, "tokens, more than 512"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop"),
        ("completions", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias: token id 9999"),
        ("completions", {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ("completions", {"prompt": "a", "seed": 2**70}, "seed"),
        ("completions", {"prompt": "a", "echo": True, "stream": True}, "echo"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options: needs stream"),
        ("completions", {"prompt": "a", "best_of": 3, "n": 2}, "best_of: expected n, 2, got 3"),
        ("completions", {"prompt": "a", "suffix": " end"}, "suffix"),
        ("completions", {"prompt": "a", "temperature": 10**400}, "temperature"),
        ("completions", {"prompt": "a", "logit_bias": {"1": 10**400}}, "logit_bias"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": []}, "tools"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs"),
    ],
)
def test_what_cannot_be_honoured_is_400_and_says_why(server: Any, path: str, body: Any, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and "\n" not in error["message"] and error["type"] == "invalid_request_error"


ONLY_TEXTS = "expected a text, token ids, a list of texts or a list of lists of token ids, none of the lists empty"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"[", None, "body: not JSON: Expecting value at character 1"),
        ({}, "prompt", "prompt: Field required"),
        ({"prompt": [1, "a"]}, "prompt", f"prompt: {ONLY_TEXTS}"),
        ({"prompt": "a", "temprature": 1}, "temprature", "temprature: not known here"),
        ({"prompt": "a", "stop": ["a" * 300]}, "stop", "stop: expected a text of 1 to 256 characters or a list of at"),
        ({"prompt": "a", "presence_penalty": 0.1}, "presence_penalty", "presence_penalty: expected 0: repetition_pen"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "logit_bias: expected an object of at most 1024 token"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "messages.0.content: expect",
        ),
        ({"prompt": [5000]}, "prompt", "token id 5000: "),
        (b'{"prompt": "\\ud800"}', "prompt", "the prompt holds half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages", "the prompt holds half"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "logit_bias: token id 9999"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of: expected n, 1, got 3"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream_options: needs stream"),
        ({"prompt": "a", "stop": "a<|endoftext|>"}, "stop", "stop: 'a<|endoftext|>' holds the special token"),
    ],
)
def test_a_fault_is_one_clause_and_names_its_field(server: Any, body: Any, param: str | None, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = "chat/completions" if b"messages" in content else "completions"
    answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(message) and "; prompt" not in error["message"]


def test_other_refusals(server: Any) -> None:
    post = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "model": "gpt-5"})
    assert post.status_code == 404 and "'tiny' is" in post.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    large = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * 60_000})
    assert large.status_code == 413 and "larger than 50000 bytes" in large.json()["error"]["message"]


def test_a_body_that_does_not_end_is_given_up(start: Callable[..., Any]) -> None:
    slow = start(model="random:micro", body_seconds=0.3)
    with socket.create_connection(("127.0.0.1", slow.port), timeout=10) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert b"408" in link.recv(4096).split(b"\r\n")[0]


def test_the_key(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    guarded = start(model="random:micro", api_key_file=tmp_path / "key")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"Authorization": "bearer s3cret"}, 200),
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert httpx.get(guarded.url + path, headers=headers).status_code == status, (path, headers)
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.post(f"{guarded.url}/v1/completions", json={"prompt": "a"}).status_code == 401


@pytest.mark.parametrize("space", ["\n", " \r\n", ""])
def test_the_key_of_the_environment_may_end_in_a_newline(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    monkeypatch.setenv("MAMBACUS_API_KEY", "s3cret" + space)
    guarded = start(model="random:micro")
    for key, status in (("s3cret", 200), ("wrong", 401)):
        assert httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status


@pytest.mark.parametrize(("key", "got"), [("", "nothing"), (" \n", "nothing"), ("a\nb\n", "2 lines")])
def test_a_key_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, got: str
) -> None:
    (tmp_path / "key").write_text(key)
    assert main(["serve", "--model", "random:micro", "--api-key-file", str(tmp_path / "key")]) == 2
    assert f"--api-key-file {tmp_path / 'key'}: expected a key, got {got}\n" in capsys.readouterr().err
    monkeypatch.setenv("MAMBACUS_API_KEY", key)
    assert main(["serve", "--model", "random:micro"]) == 2
    assert f"MAMBACUS_API_KEY: expected a key, got {got}\n" in capsys.readouterr().err


def test_what_is_too_much_or_too_long(start: Callable[..., Any]) -> None:
    small = start(model="random:micro", batch_size=2, most_waiting=1, request_seconds=2.5, most_new_tokens=100_000)
    url = f"{small.url}/v1/completions"
    for _ in range(60):  # kernels may have to be compiled, which takes longer than a request may
        if httpx.post(url, json={"prompt": "a", "max_tokens": 2}, timeout=60).status_code == 200:
            break
    statuses: list[int] = []
    body = LONG | {"max_tokens": 100_000}

    def ask() -> None:
        statuses.append(httpx.post(url, json=body, timeout=120).status_code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads[:3]:
        thread.start()
    for _ in range(100):
        if "completions_unfinished 3" in httpx.get(f"{small.url}/metrics").text:
            break
        time.sleep(0.01)
    for thread in threads[3:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [408, 408, 408, 429, 429]
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as answer:
        assert answer.status_code == 200
        assert "not finished after 2.5 s" in list(answer.iter_lines())[-2]
    assert httpx.post(url, json={"prompt": "a", "max_tokens": 2}, timeout=60).status_code == 200  # rows are free


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(start: Callable[..., Any], stream: bool) -> None:
    roomy = start(model="random:micro", most_new_tokens=1_000_000)
    with pytest.raises(httpx.ReadTimeout):
        body = LONG | {"max_tokens": 1_000_000, "stream": stream}
        with httpx.stream("POST", f"{roomy.url}/v1/completions", json=body, timeout=0.4) as answer:
            next(answer.iter_lines())
            raise httpx.ReadTimeout("left in the middle")
    for _ in range(600):
        figures = httpx.get(f"{roomy.url}/metrics").text
        if "completions_active 0" in figures and "completions_unfinished 0" in figures:
            return
        time.sleep(0.05)
    pytest.fail(figures)


def test_a_fault_of_the_engine_hangs_nobody(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mambacus.inference.scheduler import Scheduler

    broken = start(model="random:micro")

    def fail(self: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Scheduler, "step", fail)
    for _ in range(2):
        answer = httpx.post(f"{broken.url}/v1/completions", json={"prompt": "a"}, timeout=60)
        assert answer.status_code == 503 and "out of luck" in answer.json()["error"]["message"]
    assert httpx.get(f"{broken.url}/health").status_code == 503


def test_logits_that_are_nan_are_the_fault_of_the_server(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    ill = start(model="random:micro")
    with torch.no_grad():
        ill.engine.model.backbone.norm_f.weight.fill_(float("nan"))
    for stream in (False, True):
        body = {"prompt": "a", "max_tokens": 2, "stream": stream}
        answer = httpx.post(f"{ill.url}/v1/completions", json=body, timeout=60)
        error = answer.json()["error"]
        assert answer.status_code == 500 and error["type"] == "server_error" and "logits are NaN" in error["message"]
    assert [one.levelname for one in caplog.records if "logits are NaN" in one.message] == ["ERROR", "ERROR"]
    assert "mambacus_failed_requests_total 2\n" in httpx.get(f"{ill.url}/metrics").text
    assert httpx.get(f"{ill.url}/health").status_code == 200


def test_nan_in_the_middle_of_a_stream_is_told_there(start: Callable[..., Any]) -> None:
    ill = start(model="random:micro")
    body = {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{ill.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        with torch.no_grad():
            ill.engine.model.backbone.norm_f.weight.fill_(float("nan"))
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "logits are NaN" in error["message"]


def test_a_stream_whose_client_leaves_before_the_first_token_is_not_read_on(start: Callable[..., Any]) -> None:
    long = start(model="random:micro", prefill_tokens=1, most_prompt_tokens=100_000)
    body = {"prompt": "a" * 60_000, "max_tokens": 2, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{long.url}/v1/completions", json=body, timeout=0.5)
    for _ in range(100):
        if "completions_unfinished 0" in httpx.get(f"{long.url}/metrics").text:
            assert long.engine.stats.prompt_tokens < 60_000
            return
        time.sleep(0.05)
    pytest.fail("it is read on")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [True] * 1000},
        {"prompt": [[-1]] * 1000},
        {"prompt": ["a", *[1] * 1000]},
        {"prompt": "a", "stop": [1] * 1000},
        {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(2000)}},
        {"prompt": "a"} | {f"x{i}": 1 for i in range(1000)},
        {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [{}] * 1000}]},
    ],
    ids=lambda body: "+".join(list(body)[:2]),
)
def test_a_body_of_faults_is_refused_at_its_first(body: dict[str, Any]) -> None:
    """Or four megabytes of them would take a gigabyte and hold up all streams."""
    from pydantic import ValidationError

    from mambacus.serving.schemas import ChatRequest, CompletionRequest

    with pytest.raises(ValidationError) as found:
        (ChatRequest if "messages" in body else CompletionRequest).model_validate(body)
    assert found.value.error_count() <= 5


def test_sigterm_lets_open_streams_finish() -> None:
    command = [sys.executable, "-m", "mambacus", "serve", "--model", "random:micro", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        lines = []
        body = LONG | {"max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.send_signal(signal.SIGTERM)
                lines.append(line)
        assert process.wait(30) == 0
    assert [line for line in lines if line][-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_sigterm_cuts_what_does_not_finish_and_says_so() -> None:
    """Clients that do not read or do not write to the end: a line, no traceback, and the status of success."""
    command = [sys.executable, "-m", "mambacus", "serve", "--model", "random:micro", "--port", "0", "--device", "cpu"]
    flags = ["--most-new-tokens", "1000000", "--drain-seconds", "1.5"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        links = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(3)]
        for link, stream in zip(links, (True, False), strict=False):
            body = json.dumps(LONG | {"max_tokens": 1_000_000, "stream": stream}).encode()
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            link.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        links[2].sendall(b"POST /v1/completions HTTP/1.1\r\n")
        assert links[0].recv(1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(30) == 0 and 1 < time.monotonic() - began < 15
        assert process.stderr is not None
        assert process.stderr.read() == "2 requests cut after 1.5 s\n"
        for link in links:
            link.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999"], "--port"),
        (["--host", "999.1.1.1"], "cannot listen on 999.1.1.1"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere"),
        (["--chat-template", "nowhere"], "--chat-template nowhere"),
        (["--model", "nowhere/to/be"], "no such folder"),
    ],
)
def test_faults_of_the_command_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "random:micro", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and len([line for line in err.splitlines() if "error" in line]) == 1


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from mambacus.serve import Config, build

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mambacus\[serve\]'"):
        build(Config(model="random:micro"))
