"""One connection: HTTP/1.1 as uvicorn speaks it, with an end to clients that do not write or do not read."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mambacus.serving.limits import error_body

LAST_WORDS = 1.0  # seconds that an answer has after its time, to say that its time is up


class Connection(H11Protocol):
    """A connection that is cut when an answer has not left in time.

    An application can stop writing, but what it wrote waits for the client to read, and so does the application. So the
    limit of a whole answer stands here: when it is over, the connection is closed without waiting for the client, and
    the application sees the client gone. Likewise no application knows of a head that does not end.

    Args:
        body_seconds: longest time for a request's head to arrive, and again from there to the end of its body.
        request_seconds: longest time from there to the last byte's leaving.
        more: what uvicorn gives every protocol.
    """

    def __init__(self, *, body_seconds: float, request_seconds: float, **more: Any) -> None:
        super().__init__(**more)
        self._body_seconds, self._request_seconds = body_seconds, request_seconds + LAST_WORDS
        self._watched: tuple[RequestResponseCycle, bool] | None = None  # request, and whether its body is there
        self._limit: asyncio.TimerHandle | None = None
        self._head_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take what has arrived; what begins no request must do so soon."""
        super().data_received(data)
        if self._is_idle and self._head_limit is None:
            self._expect_head()

    def handle_events(self) -> None:
        """Take what has arrived, and let the time of a request run from its head, and again from its end."""
        super().handle_events()
        if not self._is_idle and self._head_limit is not None:
            self._head_limit.cancel()
            self._head_limit = None
        if self.cycle is None or self._watched == (self.cycle, not self.cycle.more_body):
            return
        self._watched = self.cycle, not self.cycle.more_body
        seconds = self._request_seconds + (self._body_seconds if self.cycle.more_body else 0.0)
        self._stop_limit()
        self._limit = self.loop.call_later(seconds, self._cut_late, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limits."""
        self._stop_limit()
        if self._head_limit is not None:
            self._head_limit.cancel()
        super().connection_lost(exc)

    @property
    def busy(self) -> bool:
        """Whether there is an answer that has not left as a whole."""
        unsent = self.transport.get_write_buffer_size() > 0
        return unsent or (self.cycle is not None and not self.cycle.response_complete)

    def cut(self) -> None:
        """Close without waiting for the other side."""
        self.transport.abort()

    def _cut_late(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and self.busy:
            self.cut()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_limit = self.loop.call_later(self._body_seconds, self._refuse_head)

    def _refuse_head(self) -> None:
        """Answer a head that did not end, and close; silence gets no answer."""
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            body = error_body(f"the head did not arrive in {self._body_seconds:g} s", "head_too_slow")
            headers = [
                (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), CLOSE_HEADER,
            ]  # fmt: skip
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
