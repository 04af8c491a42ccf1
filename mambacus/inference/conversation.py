"""A conversation as a state: a turn reads only what is new, however long the conversation has become."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mambacus.inference.chat_template import ChatTemplate
from mambacus.inference.completion import Completion
from mambacus.inference.engine import Engine
from mambacus.inference.reading import Request
from mambacus.inference.sampling import SamplingParams
from mambacus.inference.text import shown_tokens
from mambacus.models import MambaState
from mambacus.models.state_files import StateFile, read_state, write_state
from mambacus.runtime.errors import UserError

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Place:
    """A place in a conversation from which it can be read on.

    Attributes:
        text: all that was read since the beginning, as text.
        token_ids: the same, as tokens.
        state: after them; None if nothing was read, also not before the beginning.
    """

    text: str
    token_ids: tuple[int, ...]
    state: MambaState | None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one question and its answer cost.

    Attributes:
        read: tokens read before the answer could begin.
        again: how many of them (at most) had been read before.
        generated: tokens of the answer.
        finish_reason: as in `Completion`.
    """

    read: int
    again: int
    generated: int
    finish_reason: str


class Conversation:
    """Messages, and the states after the last of them.

    The template writes the whole conversation anew for each question. Where that text goes on from what was read, only
    the rest is read: the end of the answer before (its last token was chosen but not read), the question, and what the
    template puts around it. A template that writes the last answer in another way than it was given (without its first
    space, say), and an answer that was stopped by the user, cost the answer once more; one that changes earlier
    messages too costs the whole conversation. `Turn` tells.

    Args:
        engine: answers.
        template: makes the text.
        system: what the conversation begins with, or None.

    Attributes:
        messages: all of them, as chat templates take them.
        turns: one for each answer since the beginning or the last `load`.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, system: str | None = None) -> None:
        self.engine, self._template = engine, template
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._request: Request | None = None
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self._places: list[Place] = []  # latest first
        self._start: StateFile | None = None
        self._before: tuple[int, ...] = ()  # the tokens behind the beginning
        self._begin(None)

    @property
    def tokens(self) -> int:
        """Tokens read so far, those behind the beginning left out."""
        return len(self._places[0].token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        state = self._places[0].state
        return 0 if state is None else state.nbytes

    def ask(self, question: str, params: SamplingParams) -> Iterator[str]:
        """Yield the answer as it comes.

        The conversation has the question and the answer when all is yielded; left before, it is as it was.

        Raises:
            UserError: the template does not take the messages, or the answer could not be completed.
        """
        messages, text, place = self._next(question)
        ids = self.engine.encode(text[len(place.text) :], continues=place.state is not None)
        [self._request] = self.engine.requests(
            [ids], params, place.state, stream=True, keep_state=True, state_ids=(*self._before, *place.token_ids)
        )
        for piece in self.engine.run([self._request]):
            if piece.error is not None:
                raise UserError(piece.error)
            yield piece.text
            if piece.completion is not None:
                self._take(messages, Place(text, (*place.token_ids, *ids), None), place, piece.completion)

    def stop(self) -> None:
        """End the answer that is being given; what there is of it stays. A signal handler may call it."""
        if self._request is not None:
            self._request.cancelled = True

    def reset(self) -> None:
        """Go back to the beginning.

        Raises:
            UserError: the conversation was loaded, and began from a state that its file does not hold.
        """
        if self._start is None and self._before:
            raise UserError("the state that this conversation began from is not in its file; load that one instead")
        self._begin(self._start)

    def save(self, path: Path) -> None:
        """Write the conversation as a state file.

        Raises:
            UserError: nothing was said yet, or the file cannot be written.
        """
        if self._places[0].state is None or not self.messages:
            raise UserError(f"{path}: nothing to save: nothing was said yet")
        place = self._shown_place()
        assert place.state is not None
        said = {"messages": self.messages, "text": place.text, "tokens": len(place.token_ids)}
        file = StateFile(place.state, (*self._before, *place.token_ids), notes={"made_by": "chat", "chat": said})
        write_state(path, file, self.engine.model, self.engine.tokenizer)

    def load(self, path: Path, flag: str) -> None:
        """Go on with a saved conversation, or begin from any other state, for example a compiled prompt.

        Raises:
            UserError: as `read_state`.
        """
        file = read_state(path, self.engine.model, self.engine.tokenizer, flag=flag)
        said = file.notes.get("chat")
        if said is None:
            self._begin(file)
            return
        try:
            messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in said["messages"]]
            count, text = int(said["tokens"]), str(said["text"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{flag} {path}: its conversation is not readable") from None
        self._begin(None)
        self.messages = messages
        first = len(file.token_ids) - count
        self._before = file.token_ids[:first]
        beginning = [] if self._before else self._places  # else the state it began from is not known
        self._places = [Place(text, file.token_ids[first:], file.state), *beginning]

    def _shown_place(self) -> Place:
        """Return the latest place; where it is within a stop string, which nobody saw, one before that, read now."""
        last = self._places[0]
        if not self.turns or self.turns[-1].finish_reason != "stop":
            return last
        question, answer = self._places[1], self.messages[-1]["content"]
        if (question.text + answer).startswith(last.text):
            return last
        ids = shown_tokens(self.engine.tokenizer, last.token_ids[len(question.token_ids) :], answer)
        if not ids:
            return question
        state = self.engine.prefill(ids, question.state)
        return Place(question.text + answer, (*question.token_ids, *ids), state)

    def _begin(self, start: StateFile | None) -> None:
        self._start = start
        self._before = () if start is None else start.token_ids
        self.messages, self.turns = list(self._opening), []
        self._places = [Place("", (), None if start is None else start.state)]

    def _next(self, question: str) -> tuple[list[Message], str, Place]:
        """Return the messages with a question, their text, and the latest place that it goes on from.

        Where the template puts a space before an answer that has one already, the answer is taken without.
        """
        best: tuple[int, list[Message], str] | None = None
        for said in self._ways():
            messages = [*said, {"role": "user", "content": question}]
            text = self._template.prompt(messages)
            number = next((n for n, place in enumerate(self._places) if text.startswith(place.text)), None)
            if number is not None and (best is None or number < best[0]):
                best = number, messages, text
        if best is None:
            raise UserError(
                "the chat template writes this conversation otherwise than it was read, and the state that it began "
                "from is not in its file"
            )
        return best[1], best[2], self._places[best[0]]

    def _ways(self) -> Iterator[list[Message]]:
        """Yield the messages, and again with other space around the last answer."""
        yield self.messages
        if self.messages and self.messages[-1]["role"] == "assistant":
            *earlier, last = self.messages
            for content in dict.fromkeys((last["content"].removeprefix(" "), last["content"].strip())):
                if content != last["content"]:
                    yield [*earlier, {**last, "content": content}]

    def _take(self, messages: list[Message], prompt: Place, place: Place, answer: Completion) -> None:
        """Take note of an answer, unless it was stopped before its first word."""
        if answer.finish_reason == "cancelled" and not answer.text:
            return
        read, again = len(prompt.token_ids) - len(place.token_ids), self.tokens - len(place.token_ids)
        self.turns.append(Turn(read, min(read, again), len(answer.token_ids), answer.finish_reason))
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        places = [dataclasses.replace(prompt, state=answer.prompt_state)]
        if answer.state is not None:
            ids = answer.token_ids[:-1]
            said = self.engine.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            places.insert(0, Place(prompt.text + said, (*prompt.token_ids, *ids), answer.state))
        beginning = self._places[-1]
        self._places = [*places, beginning] if not beginning.text else places
