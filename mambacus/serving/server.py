"""Listening: uvicorn with an end that lets open requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from mambacus.runtime.errors import UserError
from mambacus.serving.connections import Connection
from mambacus.serving.limits import Limits
from mambacus.serving.service import LOG


class _Server(uvicorn.Server):
    """Uvicorn's server without its signal handlers, which would end the process by the signal after the drain.

    Args:
        config: uvicorn's.
        drain_seconds: time for open requests to finish at the end; what is open then is cut.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and return when no connection is left."""
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _cut(self) -> None:
        """Close what is open: the applications see their clients gone, and end as they do then."""
        open_ones: list[Any] = list(self.server_state.connections)
        busy = sum(one.busy for one in open_ones)
        if busy:
            LOG.warning("%d requests cut after %g s", busy, self._drain_seconds)
        for one in open_ones:
            one.cut()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def settings(app: Any, limits: Limits, **more: Any) -> uvicorn.Config:
    """Return how ``app`` is served within ``limits``; ``more`` are further settings of uvicorn."""
    protocol = functools.partial(Connection, body_seconds=limits.body_seconds, request_seconds=limits.seconds)
    return uvicorn.Config(
        app, http=protocol, ws="none", log_level="warning", timeout_keep_alive=15,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=1 << 16, server_header=False, **more,
    )  # fmt: skip


def serve(app: Any, limits: Limits, host: str, port: int, drain_seconds: float) -> None:
    """Serve ``app`` until SIGTERM or SIGINT: then accept no more, finish what is open, and return.

    Prints one line with the address once it answers.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    server = _Server(settings(app, limits), drain_seconds)
    asyncio.run(_serve(server, listener))


async def _serve(server: _Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await running
