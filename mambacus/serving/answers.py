"""From the engine's pieces to the bodies of answers, whole and in parts."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from mambacus.inference import Completion, Engine, Piece, Request, TokenScore
from mambacus.inference.text import INCOMPLETE, TextStream, decode

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


def event(part: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    # All ASCII: there are clients that take U+2028 or U+0085 in a text for the end of a line.
    return b"data: " + json.dumps(part).encode() + b"\n\n"


class Answers:
    """The answer to one request of one or several prompts, each completed ``n`` times.

    Args:
        model: name of the model.
        engine: whose tokenizer made the tokens.
        requests: what the engine was given, one for each prompt.
    """

    kind = ""
    part_kind = ""

    def __init__(self, model: str, engine: Engine, requests: Sequence[Request]) -> None:
        self._head = {"id": f"{self.kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokenizer, self._requests = engine.tokenizer, requests
        self._n = requests[0].params.n
        self._done: dict[int, tuple[int, Completion]] = {}
        self._generated = 0

    async def read(self, pieces: AsyncIterator[Piece]) -> None:
        """Take all pieces."""
        async for piece in pieces:
            self._note(piece)

    def whole(self) -> dict[str, Any]:
        """Return the body when all pieces were taken."""
        choices = [self._choice(index, *self._done[index]) for index in sorted(self._done)]
        return {**self._head, "object": self.kind_of_whole(), "choices": choices, "usage": self._usage()}

    def parts(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of one piece."""
        self._note(piece)
        done = piece.completion
        if piece.text or piece.logprobs or done is not None:
            reason = FINISH[done.finish_reason] if done is not None else None
            yield self._part([self._new(piece.prompt * self._n + piece.sample, piece, reason)])

    def last(self) -> dict[str, Any]:
        """Return the event that tells the usage."""
        return self._part([]) | {"usage": self._usage()}

    def kind_of_whole(self) -> str:
        """Return the ``object`` of a whole answer."""
        return self.part_kind

    def _note(self, piece: Piece) -> None:
        self._generated += len(piece.token_ids)
        if piece.completion is not None:
            self._done[piece.prompt * self._n + piece.sample] = (piece.prompt, piece.completion)

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.part_kind, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        """Return the tokens of the request; those behind the server's own state are none of them."""
        given = sum(len(request.ids) for request in self._requests)
        return {
            "prompt_tokens": given,
            "completion_tokens": self._generated,
            "total_tokens": given + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached for request in self._requests)},
        }

    def _token(self, token: int) -> str:
        return decode_token(self._tokenizer, token)

    def _choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError

    def _new(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError


class Places:
    """Where in a text its tokens begin, in characters; all tokens of a character begin where it does.

    Args:
        tokenizer: made the tokens.
        start: characters before them.
        named: special tokens stand in the text by their names; else they are no part of it.
    """

    def __init__(self, tokenizer: Any, start: int = 0, *, named: bool = False) -> None:
        self._text, self._start, self._names = TextStream(tokenizer), start, {}
        if named and tokenizer is not None:
            special = tokenizer.added_tokens_decoder.items()
            self._names = {token: len(str(added)) for token, added in special if added.special}

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Return the places of the next tokens."""
        places = []
        for token in tokens:
            places.append(self._start + self._text.length)
            self._text.add(token)
            self._start += self._names.get(token, 0)
        return places


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``; with ``echo`` they begin with the prompt, ``echo_alone`` leaves out the rest."""

    kind = "cmpl"
    part_kind = "text_completion"

    def __init__(
        self,
        model: str,
        engine: Engine,
        requests: Sequence[Request],
        prompts: Sequence[str | list[int]],
        *,
        echo: bool,
        echo_alone: bool = False,
    ) -> None:
        super().__init__(model, engine, requests)
        self._echo, self._echo_alone = echo, echo_alone
        self._places: dict[int, Places] = {}  # of the tokens streamed so far, by choice
        self._named = [isinstance(prompt, str) for prompt in prompts]  # a text holds special tokens by name
        self._texts = [p if isinstance(p, str) else decode(self._tokenizer, p) for p in prompts] if echo else []

    def _note(self, piece: Piece) -> None:
        if self._echo_alone and piece.completion is not None:
            given = piece.completion
            scores = None if given.logprobs is None else given.logprobs[:0]
            given = dataclasses.replace(given, text="", token_ids=[], logprobs=scores, finish_reason="length")
            piece = dataclasses.replace(piece, token_ids=[], completion=given)
        super()._note(piece)

    def _choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        before = self._texts[prompt] if self._echo else ""
        logprobs = None
        if completion.logprobs is not None:
            ids: list[int] = completion.token_ids
            scores: list[TokenScore | None] = [*completion.logprobs]
            places = Places(self._tokenizer, len(before)).take(ids)
            if self._echo:
                read = self._requests[prompt].ids
                ids, scores = [*read, *ids], [*(completion.prompt_logprobs or []), *scores]
                places = Places(self._tokenizer, named=self._named[prompt]).take(read) + places
            logprobs = self._logprobs(ids, scores, places)
        return {
            "index": index,
            "text": before + completion.text,
            "logprobs": logprobs,
            "finish_reason": FINISH[completion.finish_reason],
        }

    def _new(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        scores = None
        if piece.logprobs is not None:
            places = self._places.setdefault(index, Places(self._tokenizer)).take(piece.token_ids)
            scores = self._logprobs(piece.token_ids, piece.logprobs, places)
        return {"index": index, "text": piece.text, "logprobs": scores, "finish_reason": reason}

    def _logprobs(self, ids: Sequence[int], scores: Sequence[TokenScore | None], places: list[int]) -> dict[str, Any]:
        """Return the four parallel lists of this API; tokens of one text share a key, the likeliest keeps it."""
        tokens = [self._token(token) for token in ids]
        tops: list[dict[str, float] | None] = []
        for score in scores:
            if score is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, value in (*score.top, (score.token_id, score.logprob)):
                top.setdefault(self._token(token), value)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": tops,
            "text_offset": places,
        }


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``."""

    kind = "chatcmpl"
    part_kind = "chat.completion.chunk"

    def __init__(self, model: str, engine: Engine, requests: Sequence[Request]) -> None:
        super().__init__(model, engine, requests)
        self._begun: set[int] = set()

    def kind_of_whole(self) -> str:
        """Return the ``object`` of a whole answer."""
        return "chat.completion"

    def _choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": None if completion.logprobs is None else {"content": self._content(completion.logprobs)},
            "finish_reason": FINISH[completion.finish_reason],
        }

    def _new(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        scores = None if piece.logprobs is None else {"content": self._content(piece.logprobs)}
        return {"index": index, "delta": {**delta, "content": piece.text}, "logprobs": scores, "finish_reason": reason}

    def _content(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return [
            {**self._one(score.token_id, score.logprob), "top_logprobs": [self._one(*other) for other in score.top]}
            for score in scores
        ]

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        whole = INCOMPLETE not in text  # else it is part of a character, and its bytes are others
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def decode_token(tokenizer: Any, token: int) -> str:
    """Return the text of one token, special ones by name."""
    if tokenizer is None:
        return str(token)
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
