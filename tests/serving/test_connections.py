"""What a client can hold on to by not reading or not writing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mambacus.inference import Engine, SamplingParams
from mambacus.models import load
from mambacus.serving import service
from mambacus.serving.limits import Limits
from mambacus.serving.metrics import Metrics

MANY = SamplingParams(max_new_tokens=40, ignore_eos=True, n=3)


@contextlib.contextmanager
def listening(app: Any, limits: Limits) -> Iterator[tuple[str, int]]:
    """Serve an ASGI application on a thread."""
    import uvicorn

    from mambacus.serving.server import settings

    server = uvicorn.Server(settings(app, limits, port=0, lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(20)


class Talker:
    """An application that answers with ``parts`` of ``size`` bytes."""

    def __init__(self, parts: int, size: int) -> None:
        self.parts, self.size, self.ended = parts, size, threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-length", str(self.parts * self.size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in range(self.parts):
            await send({"type": "http.response.body", "body": bytes(self.size), "more_body": part < self.parts - 1})
        self.ended.set()


def read_all(link: socket.socket) -> int:
    """Return how many bytes come before the other side closes."""
    size = 0
    with contextlib.suppress(ConnectionResetError):
        while data := link.recv(1 << 20):
            size += len(data)
    return size


@pytest.mark.parametrize("parts", [64, 1], ids=["while it is written", "when all is written"])
def test_an_answer_that_nobody_reads_is_cut(parts: int) -> None:
    talker = Talker(parts, (64 << 20) // parts)
    with listening(talker, Limits(seconds=0.2)) as address, socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(20)
        link.connect(address)
        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert talker.ended.wait(10)  # the application is let go
        time.sleep(2)
        assert read_all(link) < 64 << 20


def test_an_answer_that_is_read_in_time_is_whole_and_the_connection_goes_on() -> None:
    with (
        listening(Talker(2, 1 << 20), Limits(seconds=0.2)) as address,
        socket.create_connection(address, timeout=20) as link,
    ):
        for _ in range(2):
            link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            size = 0
            while size < 2 << 20:
                data = link.recv(1 << 20)
                assert data
                size += len(data)
            time.sleep(1.5)


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("first", "answers"), [(b"", []), (HEAD, [b"408"]), (HEAD + b"\r\n" + HEAD, [b"200", b"408"])],
    ids=["silence", "half a head", "half of the second"],
)  # fmt: skip
def test_a_head_that_does_not_end_is_given_up(first: bytes, answers: list[bytes]) -> None:
    limits = Limits(body_seconds=0.6)
    with listening(Talker(1, 3), limits) as address, socket.create_connection(address, timeout=10) as link:
        link.sendall(first)
        stop = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while first and not stop.wait(0.1):
                    link.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        began, got = time.monotonic(), b""
        with contextlib.suppress(ConnectionResetError):
            while data := link.recv(4096):
                got += data
        stop.set()
        thread.join()
        assert time.monotonic() - began < 5
        assert [part.split()[0] for part in got.split(b"HTTP/1.1 ")[1:]] == answers
        assert not answers or b'"message": "the head did not arrive in 0.6 s"' in got


def test_heads_in_time_may_come_in_parts() -> None:
    limits = Limits(body_seconds=0.6)
    with listening(Talker(1, 3), limits) as address, socket.create_connection(address, timeout=10) as link:
        for _ in range(3):
            link.sendall(HEAD)
            time.sleep(0.3)
            link.sendall(b"\r\n")
            got = b""
            while not got.endswith(bytes(3)):
                data = link.recv(4096)
                assert data
                got += data
            time.sleep(0.7)  # between requests there is more time


def test_completions_that_nobody_reads_take_no_place() -> None:
    async def ask() -> None:
        one = service.Service(Engine(*load("random:micro"), batch_size=3), Metrics(), most_waiting=0)
        one.start()
        pieces = one.run(await one.prepare(["a"], [MANY], stream=True))
        await anext(pieces)
        assert one.unfinished == 3
        for _ in range(1000):
            if not one.unfinished:
                break
            await asyncio.sleep(0.02)
        assert one.unfinished == 0
        assert len([piece async for piece in pieces if piece.completion is not None]) == 3  # all are there yet
        one.stop()

    asyncio.run(ask())


def test_what_waits_to_be_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_UNREAD", 50)

    async def ask() -> None:
        one = service.Service(Engine(*load("random:micro"), batch_size=3), Metrics(), most_waiting=0)
        one.start()
        pieces = one.run(await one.prepare(["a"], [MANY], stream=True))
        await anext(pieces)
        for _ in range(1000):
            if not one.unfinished:
                break
            await asyncio.sleep(0.02)
        with pytest.raises(service.UnreadError, match="50 pieces"):
            await anext(pieces)
        one.stop()

    asyncio.run(ask())
