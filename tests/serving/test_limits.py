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

from mambacus.cli import main
from mambacus.runtime.errors import UserError

LONG = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", b"{", "JSON decode error"),
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
