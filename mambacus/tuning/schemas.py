"""What a row of training data can look like, and the text it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from mambacus.data.prompts import qa_completion, qa_prompt
from mambacus.data.sources import read_options
from mambacus.runtime.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
EMPTY_TURN = "empty turn of the assistant"
_EXPECTED = "a row needs question and answer; prompt and completion; messages; or text"


@dataclasses.dataclass(frozen=True)
class Example:
    """The text a model is given and the text it shall learn to continue it with.

    Attributes:
        prompt: may be empty.
        completion: is trained on.
        is_text: running text, which may be cut into pieces where it is too long.
        where: file and line, for listings; no part of what makes two examples equal.
    """

    prompt: str
    completion: str
    is_text: bool = False
    where: str = dataclasses.field(default="", compare=False, repr=False)


def examples_of(
    row: dict[str, Any], where: str, tokenizer: Any = None, drop: Callable[[str, str, str], None] | None = None
) -> Iterator[Example]:
    """Yield the examples of one row; a conversation gives one for each turn of the assistant, the rest yield one.

    Args:
        row: of one of the schemas: ``question, answer[, solution, options]``; ``prompt, completion``; ``messages`` (a
            list of ``role`` and ``content``); ``text``.
        where: file and line, for messages.
        tokenizer: has the chat template for ``messages``; without one `CHAT_TEMPLATE` is used.
        drop: told place, reason and text of a turn of the assistant that is empty, which is not trained on.

    Raises:
        UserError: none of the schemas, or a value of the wrong type.
    """
    if "question" in row or "answer" in row:
        yield _question(row, where)
    elif "messages" in row:
        yield from _conversation(row["messages"], where, tokenizer, drop)
    elif "prompt" in row or "completion" in row:
        for key in ("prompt", "completion"):
            text_of(row, key, where, strip=False)
        yield Example(row["prompt"], row["completion"], where=where)
    elif "text" in row:
        yield Example("", text_of(row, "text", where, strip=False), is_text=True, where=where)
    elif "conversations" in row:
        raise UserError(
            f"{where}: conversations of from and value are not read; rename them to messages of role and content, "
            "human to user and gpt to assistant"
        )
    else:
        raise UserError(f"{where}: missing key 'question'; {_EXPECTED}, got {', '.join(row) or 'no keys'}")


def _question(row: dict[str, Any], where: str) -> Example:
    question = text_of(row, "question", where)
    answer = text_of(row, "answer", where)
    solution = text_of(row, "solution", where) if row.get("solution") is not None else None
    prompt = qa_prompt(question, read_options(row, answer, where))
    if solution is None and len(answer.split()) > 1:  # the worked answer itself, as in GSM8K's own files
        return Example(prompt, f" {answer}", where=where)
    return Example(prompt, qa_completion(solution, answer), where=where)


def _conversation(
    messages: Any, where: str, tokenizer: Any, drop: Callable[[str, str, str], None] | None
) -> Iterator[Example]:
    messages = _with_joined_parts(messages)
    fault = _message_fault(messages)
    if fault:
        raise UserError(f"{where}: messages: {fault}")
    template = getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            if drop is not None:
                drop(where, EMPTY_TURN, f"message {place + 1} of {len(messages)}")
        elif message["role"] == "assistant":
            prompt = _render(tokenizer, messages[:place], template, True)
            whole = _render(tokenizer, messages[: place + 1], template, False)
            if not whole.startswith(prompt):
                raise UserError(f"{where}: the chat template rewrites the prompt once the answer follows it")
            yield Example(prompt, whole[len(prompt) :], where=where)


def _with_joined_parts(messages: Any) -> Any:
    """Return the messages with contents that are lists of text parts, as OpenAI's interface has them, as one text."""
    if not isinstance(messages, (list, tuple)):
        return messages
    return [
        message | {"content": "".join(part["text"] for part in message["content"])}
        if isinstance(message, dict) and _are_texts(message.get("content"))
        else message
        for message in messages
    ]


def _are_texts(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )


def _render(tokenizer: Any, messages: list[dict[str, str]], template: str, asks: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=asks
    )
    return text


def _message_fault(messages: Any) -> str | None:
    if not isinstance(messages, (list, tuple)) or not messages:
        return f"expected a list of role and content, got {messages!r:.60}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            is_null = isinstance(message, dict) and message.get("content", "") is None
            hint = "; leave messages whose content is null out, such as calls of tools" if is_null else ""
            return f"message {number}: expected role and content, both text (or a list of text parts){hint}"
        if message.get("role") not in ROLES:
            return f"message {number}: role: expected one of {', '.join(ROLES)}, got {message.get('role')!r}"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no turn of the assistant to learn from"
    return None


def text_of(row: dict[str, Any], key: str, where: str, *, strip: bool = True) -> str:
    """Return the text under ``key``.

    Raises:
        UserError: missing, no text, or empty.
    """
    if key not in row:
        raise UserError(f"{where}: missing key {key!r}; {_EXPECTED}, got {', '.join(row) or 'no keys'}")
    value = row[key]
    if key == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected text, got a {type(value).__name__}")
    if not value.strip() and key != "prompt":
        raise UserError(f"{where}: {key} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {key}: expected text, got half of a surrogate pair in it") from None
    return value.strip() if strip else value
