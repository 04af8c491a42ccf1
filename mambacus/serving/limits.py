"""What stands before the routes, in plain ASGI: the key, the size and time of bodies, and the count of answers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")  # counted by name
OPEN_PATHS = ("/health",)  # asked for by load balancers, without a key


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: largest body.
        body_seconds: longest time for the body to arrive.
        prompt_tokens: most tokens of one prompt.
        new_tokens: most tokens of one completion.
        completions: most completions of one request, prompts times ``n``.
        seconds: longest time from the body to the end of the answer.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 10.0
    prompt_tokens: int = 65536
    new_tokens: int = 4096
    completions: int = 128
    seconds: float = 300.0


class Gate:
    """Lets a request pass whose key is right and whose body has arrived in time and is not too large.

    Args:
        app: what handles requests that pass.
        key: the key that ``Authorization: Bearer`` must carry, or None.
        limits: of the body.
        requests: answers by (path, status) are counted here.
    """

    def __init__(self, app: App, key: str | None, limits: Limits, requests: Counter[tuple[str, int]]) -> None:
        self._app, self._limits, self._requests = app, limits, requests
        # Hashes have one length, so the comparison takes one time whatever was sent.
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._requests[path, message["status"]] += 1
            await send(message)

        await self._handle(scope, receive, counted)

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        if not self._has_key(scope):
            await refuse(send, 401, "no key, or a wrong one: send Authorization: Bearer KEY", "invalid_api_key")
            return
        body: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                if not await self._read(receive, body):
                    text = f"the body is larger than {self._limits.body_bytes} bytes"
                    await refuse(send, 413, text, "body_too_large")
                    return
        except TimeoutError:
            await refuse(send, 408, f"the body did not arrive in {self._limits.body_seconds:g} s", "body_too_slow")
            return
        except ConnectionError:
            return

        whole = [b"".join(body)]

        async def replay() -> Message:
            if whole:
                return {"type": "http.request", "body": whole.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _has_key(self, scope: Message) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key)
        return same and kind.lower() == b"bearer"

    async def _read(self, receive: Receive, body: list[bytes]) -> bool:
        """Read the whole body; return whether it is small enough.

        Raises:
            ConnectionError: the other side is gone.
        """
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part = message.get("body", b"")
            size += len(part)
            if size > self._limits.body_bytes:
                return False
            body.append(part)
            if not message.get("more_body", False):
                return True


def error_body(message: str, code: str, kind: str = "invalid_request_error", param: str | None = None) -> bytes:
    """Return the body of an answer that refuses, in OpenAI's form."""
    clean = " ".join(message.encode("utf-8", "replace").decode().split())
    return json.dumps({"error": {"message": clean, "type": kind, "param": param, "code": code}}).encode()


async def refuse(send: Send, status: int, message: str, code: str) -> None:
    """Answer and close: what is left of the body is not waited for."""
    body = error_body(message, code)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
