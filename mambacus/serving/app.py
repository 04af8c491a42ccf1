"""The routes: OpenAI's completions and chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mambacus.inference import Piece
from mambacus.inference import Request as EngineRequest
from mambacus.inference.chat_template import ChatTemplate
from mambacus.runtime.errors import UserError
from mambacus.serving.answers import Answers, ChatAnswers, CompletionAnswers, event
from mambacus.serving.limits import Gate, Limits, error_body
from mambacus.serving.schemas import (
    Answer,
    ChatRequest,
    CompletionRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    explain,
)
from mambacus.serving.service import LOG, BrokenError, OverloadedError, Service, UnreadError

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request cannot be honoured; the message says why."},
    401: {"model": ErrorAnswer, "description": "No key, or a wrong one."},
    404: {"model": ErrorAnswer, "description": "Another model is served."},
    408: {"model": ErrorAnswer, "description": "The request took too long."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "Too many completions wait already."},
    500: {"model": ErrorAnswer, "description": "The model gave no completion: its logits are NaN."},
    503: {"model": ErrorAnswer, "description": "The engine has stopped."},
}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}  # of a stream
GENERATES: dict[int | str, dict[str, Any]] = REFUSALS | {
    200: {"model": Answer, "content": {"text/event-stream": {"schema": EVENT}}}
}


class RefusedError(Exception):
    """A request that gets an error for an answer, the client's fault below status 500, the server's from there on."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Handlers:
    """What the routes do.

    Args:
        service: completes.
        name: the model's name.
        chat: makes prompts of conversations.
        limits: of one request.
    """

    def __init__(self, service: Service, name: str, chat: ChatTemplate, limits: Limits) -> None:
        self._service, self._name, self._chat, self._limits = service, name, chat, limits
        self._created = int(time.time())

    def models(self) -> ModelList:
        """Return the one model that is served."""
        return ModelList(data=[ModelCard(id=self._name, created=self._created)])

    def model(self, model: str) -> ModelCard:
        """Return the model that is served, if it is the one asked for."""
        self._check_model(model)
        return self.models().data[0]

    def health(self) -> Response:
        """Tell whether the engine works."""
        if self._service.fault is not None:
            return Response(
                error_body(self._service.fault, "broken", "server_error"), 503, media_type="application/json"
            )
        return JSONResponse({"status": "ok"})

    def metrics(self) -> Response:
        """Return all figures."""
        service, stats, cache = self._service, self._service.engine.stats, self._service.engine.prefix_cache
        gauges: dict[str, tuple[str, str, float]] = {
            "prompt_tokens_read_total": ("counter", "Prompt tokens read, cached ones left out.", stats.prompt_tokens),
            "generated_tokens_total": ("counter", "Tokens chosen.", stats.generated_tokens),
            "prefill_seconds_total": ("counter", "Time spent reading.", stats.prefill_seconds),
            "decode_seconds_total": ("counter", "Time spent choosing.", stats.decode_seconds),
            "state_tokens": ("gauge", "Tokens behind the state that every request goes on from.", service.state_tokens),
            "failed_requests_total": ("counter", "Requests without a completion: NaN.", service.metrics.failed),
            "completions_active": ("gauge", "Completions being decoded.", service.active),
            "completions_unfinished": ("gauge", "Completions asked for and not finished.", service.unfinished),
        }  # fmt: skip
        if cache is not None:
            gauges |= {
                "prefix_cache_bytes": ("gauge", "Bytes of cached states.", cache.nbytes),
                "prefix_cache_hits_total": ("counter", "Prompts that began with a cached text.", cache.hits),
                "prefix_cache_misses_total": ("counter", "Prompts that did not.", cache.misses),
                "prefix_cache_tokens_saved_total": ("counter", "Tokens not read again.", cache.tokens_saved),
            }
        return Response(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Answer ``POST /v1/completions``."""
        began = time.monotonic()
        self._check_model(body.model)
        if body.echo and body.stream:
            raise RefusedError(400, "echo: not together with stream", "unsupported", "echo")
        body.check()
        prompts = body.prompts()
        scored = bool(body.echo) and body.logprobs is not None
        most = self._most_tokens(body.max_tokens, body.usual_tokens)
        # The engine chooses at least one token; where none was asked for, the answer leaves it out.
        params = [body.sampling(max(1, most), body.logprobs, prompt_logprobs=scored) for _ in prompts]
        requests = await self._prepare(prompts, params, stream=bool(body.stream))
        answers = CompletionAnswers(
            self._name, self._service.engine, requests, prompts, echo=bool(body.echo), echo_alone=not most
        )
        return await self._answer(body, request, requests, answers, began)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer ``POST /v1/chat/completions``."""
        began = time.monotonic()
        self._check_model(body.model)
        body.check()
        if body.top_logprobs is not None and not body.logprobs:
            raise RefusedError(400, "top_logprobs: needs logprobs", "unsupported", "top_logprobs")
        prompt = self._chat.prompt([message.plain() for message in body.messages])
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        scores = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling(self._most_tokens(asked), scores)
        requests = await self._prepare([prompt], [params], stream=bool(body.stream))
        answers = ChatAnswers(self._name, self._service.engine, requests)
        return await self._answer(body, request, requests, answers, began)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise RefusedError(404, f"model {name!r}: not served here; {self._name!r} is", "model_not_found", "model")

    def _most_tokens(self, asked: int | None, usual: int | None = None) -> int:
        """Return the length limit of a completion: what was asked for, else ``usual``, as far as the server's goes."""
        most = self._limits.new_tokens
        if asked is not None and asked > most:
            raise RefusedError(
                400, f"max_tokens: expected at most {most}, got {asked}", "too_many_tokens", "max_tokens"
            )
        return min(usual or most, most) if asked is None else asked

    async def _prepare(self, prompts: Sequence[Any], params: Sequence[Any], *, stream: bool) -> list[EngineRequest]:
        rows = sum(one.n for one in params)
        if rows > self._limits.completions:
            raise RefusedError(
                400, f"expected at most {self._limits.completions} completions, got {rows}", "too_many", "n"
            )
        requests = await self._service.prepare(prompts, params, stream=stream)
        longest = max(len(one.ids) for one in requests)
        if longest > self._limits.prompt_tokens:
            text = f"the prompt has {longest} tokens, more than {self._limits.prompt_tokens}"
            raise RefusedError(400, text, "context_length_exceeded", "prompt")
        return requests

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        request: Request,
        requests: list[EngineRequest],
        answers: Answers,
        began: float,
    ) -> Response:
        """Run the requests and answer with all of it, or piece by piece."""
        pieces = self._timed(requests, began)
        if not body.stream:
            await _unless_gone(request, answers.read(pieces))
            return JSONResponse(answers.whole())
        usage = body.stream_options is not None and body.stream_options.include_usage
        first = await _unless_gone(request, anext(pieces))  # what goes wrong before can still be told in the status
        return StreamingResponse(_events(first, pieces, answers, usage), media_type="text/event-stream")

    async def _timed(self, requests: list[EngineRequest], began: float) -> AsyncIterator[Piece]:
        """Yield the pieces, for as long as a request that ``began`` then may last."""
        metrics = self._service.metrics
        waiting = True
        source = self._service.run(requests)
        async with contextlib.aclosing(source):  # type: ignore[type-var]
            while True:
                try:
                    left = self._limits.seconds - (time.monotonic() - began)
                    piece = await asyncio.wait_for(anext(source), max(0.0, left))
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise RefusedError(408, f"not finished after {self._limits.seconds:g} s", "timeout") from None
                except UnreadError as error:
                    raise RefusedError(408, str(error), "too_slow") from None
                if waiting:
                    metrics.first_token.observe(time.monotonic() - began)
                    waiting = False
                if piece.error is not None:
                    metrics.failed += 1
                    LOG.error("no completion: %s", piece.error)
                    raise RefusedError(500, piece.error, "no_completion")
                yield piece
        metrics.duration.observe(time.monotonic() - began)


async def _events(first: Piece, rest: AsyncIterator[Piece], answers: Answers, usage: bool) -> AsyncIterator[bytes]:
    """Yield server-sent events; a fault on the way becomes the last one."""
    async with contextlib.aclosing(rest):  # type: ignore[type-var]
        try:
            for part in answers.parts(first):
                yield event(part)
            async for piece in rest:
                for part in answers.parts(piece):
                    yield event(part)
        except RefusedError as error:
            yield b"data: " + error_body(str(error), error.code, _kind(error.status)) + b"\n\n"
            return
        except BrokenError as error:
            yield b"data: " + error_body(str(error), "broken", _kind(503)) + b"\n\n"
            return
    if usage:
        yield event(answers.last())
    yield b"data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Any) -> Any:
    """Return what ``work`` gives, but give it up when the other side leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise RefusedError(400, "the client left", "client_gone")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def create_app(service: Service, name: str, chat: ChatTemplate, limits: Limits, key: str | None = None) -> Any:
    """Return the ASGI application.

    Args:
        service: completes; started and stopped with the application.
        name: the model's name in answers.
        chat: makes prompts of conversations.
        limits: of one request.
        key: what clients must send, or None.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="mambacus", lifespan=life, docs_url=None, redoc_url=None)
    handlers = Handlers(service, name, chat, limits)
    app.add_api_route("/v1/completions", handlers.completions, methods=["POST"], responses=GENERATES)
    app.add_api_route("/v1/chat/completions", handlers.chat, methods=["POST"], responses=GENERATES)
    app.add_api_route("/v1/models", handlers.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", handlers.model, methods=["GET"], responses={404: REFUSALS[404]})
    broken: dict[int | str, dict[str, Any]] = {503: {"model": ErrorAnswer, "description": "The engine has stopped."}}
    app.add_api_route("/health", handlers.health, methods=["GET"], responses=broken)
    app.add_api_route("/metrics", handlers.metrics, methods=["GET"], response_class=PlainTextResponse)
    for kind, answer in (
        (RequestValidationError, _invalid), (HTTPException, _http), (RefusedError, _refused), (UserError, _user),
        (OverloadedError, _overloaded), (BrokenError, _broken),
    ):  # fmt: skip
        app.add_exception_handler(kind, answer)

    return Gate(app, key, limits, service.metrics.requests)


def _error(status: int, message: str, code: str, param: str | None = None, kind: str | None = None) -> Response:
    return Response(error_body(message, code, kind or _kind(status), param), status, media_type="application/json")


def _kind(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


async def _invalid(_: Request, error: Any) -> Response:
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        place = f"character {faults[0]['loc'][1]}"
        return _error(400, f"body: not JSON: {faults[0]['ctx']['error']} at {place}", "invalid")
    place = faults[0]["loc"]
    return _error(400, "; ".join(explain(faults)), "invalid", str(place[1]) if len(place) > 1 else None)


async def _http(_: Request, error: Any) -> Response:
    return _error(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else "invalid")


async def _refused(_: Request, error: Any) -> Response:
    return _error(error.status, str(error), error.code, error.param)


async def _user(request: Request, error: Any) -> Response:
    """Answer what the engine finds fault with: the field that it names first, else the text to go on from."""
    fields, text = (
        (ChatRequest, "messages") if request.url.path.endswith("/chat/completions") else (CompletionRequest, "prompt")
    )
    named = str(error).split()[0].rstrip(":")
    return _error(400, str(error), "invalid", named if named in fields.model_fields else text)


async def _overloaded(_: Request, error: Any) -> Response:
    answer = _error(429, "too many completions wait already; try again", "overloaded", kind="rate_limit_error")
    answer.headers["Retry-After"] = "1"
    return answer


async def _broken(_: Request, error: Any) -> Response:
    return _error(503, str(error), "broken")
