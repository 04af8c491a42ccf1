"""The engine on a thread of its own, and what requests see of it from an event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Sequence

from mambacus.inference import Engine, Piece, Request, SamplingParams, Scheduler
from mambacus.inference.engine import Prompt
from mambacus.models.primed import PrimedModel
from mambacus.serving.metrics import Metrics

LOG = logging.getLogger("mambacus.serve")
MOST_UNREAD = 1 << 16  # pieces of one request that wait for its connection; of the largest, some 200 MB


class OverloadedError(Exception):
    """Too many completions wait already."""


class BrokenError(Exception):
    """The engine stopped for a fault of its own."""


class UnreadError(Exception):
    """So much of an answer waits to be read that the rest was given up."""


@dataclasses.dataclass(eq=False)
class _Open:
    """What a connection asked for, and what it has not taken yet.

    Attributes:
        requests: one for each prompt.
        left: completions that the engine has not ended.
        found: pieces in order, or why there are no more.
    """

    requests: Sequence[Request]
    left: int
    found: asyncio.Queue[Piece | Exception] = dataclasses.field(default_factory=asyncio.Queue)


class Service:
    """Runs requests of many connections in one engine.

    Args:
        engine: what completes; nobody else may use it meanwhile.
        metrics: counted in.
        most_waiting: most completions asked for and not finished, beyond those being decoded.

    Attributes:
        fault: why the engine has stopped, None while it works.
        state_tokens: tokens behind the state that every request goes on from, 0 without one.
    """

    def __init__(self, engine: Engine, metrics: Metrics, most_waiting: int) -> None:
        self.engine, self.metrics, self.most_waiting = engine, metrics, most_waiting
        self.fault: str | None = None
        # Asked for once: no thread but the engine's may use its device later.
        self.state_tokens = int(engine.model.start().tokens) if isinstance(engine.model, PrimedModel) else 0
        self._scheduler: Scheduler
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}  # of the event loop alone
        self._unfinished = 0
        self._work = threading.Event()
        self._stopping = False
        self._encoding = threading.Lock()  # a tokenizer changes its settings while it encodes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread, with the rows and graphs that it has by now; call it from the event loop."""
        self._scheduler = self.engine.scheduler()
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Stop the engine's thread; what is unfinished stays so."""
        self._stopping = True
        self._work.set()
        self._thread.join()

    @property
    def active(self) -> int:
        """Completions being decoded."""
        return self._scheduler.active

    @property
    def unfinished(self) -> int:
        """Completions asked for and not finished."""
        return self._unfinished

    async def prepare(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, stream: bool
    ) -> list[Request]:
        """Return the checked requests, tokenized on another thread: a long text must not stop the streams.

        Raises:
            UserError: as `Engine.requests`.
        """

        def work() -> list[Request]:
            with self._encoding:
                return self.engine.requests(prompts, params, stream=stream)

        return await asyncio.to_thread(work)

    async def run(self, requests: Sequence[Request]) -> AsyncIterator[Piece]:
        """Yield the pieces of the requests as they come; leaving gives up what is unfinished.

        Raises:
            OverloadedError: too much waits already.
            BrokenError: the engine has stopped.
            UnreadError: `MOST_UNREAD` pieces wait for the caller.
        """
        rows = sum(request.params.n for request in requests)
        if self._unfinished + rows > self.most_waiting + self.engine.batch_size:
            raise OverloadedError
        if self.fault is not None:
            raise BrokenError(self.fault)
        asked = _Open(requests, rows)
        order = {}
        for place, request in enumerate(requests):
            request.number = next(self._numbers)
            order[request.number] = place
            self._open[request.number] = asked
        self._unfinished += rows
        try:
            for request in requests:
                self._scheduler.submit(request)
            self._work.set()
            while rows:
                piece = await asked.found.get()
                if isinstance(piece, Exception):
                    raise piece
                rows -= _ends(piece)
                yield dataclasses.replace(piece, prompt=order[piece.prompt])
        finally:
            self._give_up(asked)

    def _give_up(self, asked: _Open) -> None:
        """Forget requests; the engine drops what it has not ended of them."""
        self._unfinished -= asked.left
        for request in asked.requests:
            request.cancelled = request.cancelled or asked.left > 0
            self._open.pop(request.number, None)
        asked.left = 0

    def _run(self) -> None:
        """Step for as long as there is work; the event loop is told once a step, whatever the number of streams."""
        assert self._loop is not None
        while not self._stopping:
            if not (self._scheduler.active or self._scheduler.waiting):
                self._work.wait()
                self._work.clear()
                continue
            try:
                pieces = self._scheduler.step()
            except Exception as error:
                LOG.exception("the engine stopped")
                self.fault = f"{type(error).__name__}: {error}"
                self._loop.call_soon_threadsafe(self._deliver, None)
                return
            if pieces:
                self._loop.call_soon_threadsafe(self._deliver, pieces)

    def _deliver(self, pieces: list[Piece] | None) -> None:
        """Hand out pieces; a completion that has ended takes no place any more, whether or not anybody reads it."""
        if pieces is None:
            for asked in set(self._open.values()):
                asked.found.put_nowait(BrokenError(self.fault))
            return
        for piece in pieces:
            asked_for = self._open.get(piece.prompt)
            if asked_for is None:  # it was given up
                continue
            if asked_for.found.qsize() >= MOST_UNREAD:
                self._give_up(asked_for)
                asked_for.found = asyncio.Queue()  # what holds the memory
                asked_for.found.put_nowait(UnreadError(f"{MOST_UNREAD} pieces of the answer were not read"))
                continue
            asked_for.found.put_nowait(piece)
            asked_for.left -= _ends(piece)
            self._unfinished -= _ends(piece)


def _ends(piece: Piece) -> bool:
    """Tell whether a piece is the last of its completion."""
    return piece.completion is not None or piece.error is not None
