"""What the server takes: the fields of OpenAI's API that a language model alone can honour; any other is refused."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)

from mambacus.inference import SamplingParams
from mambacus.runtime.errors import UserError

MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_FIELDS = 64  # of an object: each that is not known is an error of its own
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[Finite, Field(ge=-100, le=100)]
Nothing = Annotated[float, Field(ge=0, le=0)]


def _biases(given: Any) -> Any:
    return _few(given, MOST_BIASES)


def _few(given: Any, most: int) -> Any:
    if isinstance(given, dict) and len(given) > most:
        raise ValueError(f"expected at most {most} entries, got {len(given)}")
    return given


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, given: Any) -> Any:
        return _few(given, MOST_FIELDS)


class StreamOptions(_Strict):
    """What a stream tells besides its text."""

    include_usage: StrictBool = False


class _Sampling(_Strict):
    """Fields that completions and chat completions share."""

    model: str | None = Field(None, max_length=512, description="the served model; may be left out")
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[StrictInt, Field(ge=0)] = Field(0, description="draw from the k likeliest tokens; 0: all")
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] = 1.0
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = 1
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASES), BeforeValidator(_biases)] | None = None
    ignore_eos: StrictBool = False
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="not used")
    presence_penalty: Nothing | None = 0.0
    frequency_penalty: Nothing | None = 0.0

    def check(self) -> None:
        """Find fields that do not go together.

        Raises:
            UserError: such fields.
        """
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options: needs stream")

    def sampling(self, max_tokens: int, logprobs: int | None, **more: Any) -> SamplingParams:
        """Return the engine's parameters; without a seed, one nobody knows."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            n=self.n or 1,
            stop=stop,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            **more,
        )


class CompletionRequest(_Sampling):
    """The body of ``POST /v1/completions``."""

    usual_tokens: ClassVar[int] = 16
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]], Field(min_length=1, fail_fast=True)
        ]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="16 if left out; 0, with echo: the prompt alone"
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: StrictBool | None = False
    best_of: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="as n: all samples are given")
    suffix: Literal[""] | None = None

    def check(self) -> None:
        """As that of all requests, samples that would be made and not given, and answers of nothing."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise UserError("max_tokens: expected 1 or more, got 0: nothing would be answered without echo")
        if self.best_of not in (None, self.n or 1):
            raise UserError(f"best_of: expected n, {self.n or 1}, got {self.best_of}: all samples are given")

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, one or many, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]
        return list(self.prompt)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(None, max_length=512)

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it; they know a developer as the system, as OpenAI does."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **name}


class ResponseFormat(_Strict):
    """Plain text is the only format."""

    type: Literal["text"]


class ChatRequest(_Sampling):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None


_PENALTY = "expected 0: repetition_penalty is the one there is"
EXPECTED = {  # where pydantic would tell of every way in which a value could have been meant
    "prompt": "expected a text, token ids, a list of texts or a list of lists of token ids, none of the lists empty",
    "stop": f"expected a text of 1 to 256 characters or a list of at most {MOST_STOPS}",
    "content": "expected a text or a list of parts of type text",
    "logit_bias": f"expected an object of at most {MOST_BIASES} token ids with numbers from -100 to 100",
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
}


def explain(faults: Sequence[Any]) -> list[str]:
    """Return a line for each of pydantic's first faults: the field, and what was expected."""
    lines = []
    for fault in faults[:5]:
        place, text = list(fault["loc"][1:]), str(fault["msg"]).removeprefix("Value error, ")
        number = next((n for n, name in enumerate(place) if name in EXPECTED), None)
        if number is not None and fault["type"] != "missing":
            text = EXPECTED[place[number]]
            place = place[: number + 1]
        elif fault["type"] == "extra_forbidden":
            text = "not known here"
        lines.append(f"{'.'.join(map(str, place)) or 'body'}: {text}")
    return list(dict.fromkeys(lines))


class ErrorBody(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorBody


class PromptDetails(BaseModel):
    """Of a request's prompts: the tokens that were not read, since a state after them was cached."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Answer(BaseModel):
    """The body of a completion or a chat completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "mambacus"


class ModelList(BaseModel):
    """The models that are served."""

    object: str = "list"
    data: list[ModelCard]
