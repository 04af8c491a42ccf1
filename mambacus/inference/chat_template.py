"""From a conversation to a prompt: the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError

NO_TEMPLATE = "the model's tokenizer has no chat template; give --chat-template FILE.jinja, or complete plain prompts"

_FAULTS = (TypeError, ValueError, ArithmeticError)  # of the Python that a template runs, on messages it did not expect


class ChatTemplate:
    """Makes prompts of conversations.

    Args:
        tokenizer: a transformers tokenizer or None.
        template: a Jinja template instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template or getattr(tokenizer, "chat_template", None)

    @property
    def possible(self) -> bool:
        """Whether there is a template."""
        return self._template is not None

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the text up to where the answer to the last message begins.

        Raises:
            UserError: there is no template, or it does not take these messages.
        """
        import jinja2

        if self._template is None:
            raise UserError(NO_TEMPLATE)
        try:
            return self.render(messages)
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise UserError(f"the chat template does not take these messages: {error}") from None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return what `prompt` does, with Jinja's own errors."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return text


def load_template(tokenizer: Any, path: Path | None, flag: str = "--chat-template") -> ChatTemplate:
    """Return the template in a file, or the tokenizer's own without one.

    Raises:
        UserError: the file cannot be read, or is no Jinja template.
    """
    if path is None:
        return ChatTemplate(tokenizer)
    import jinja2

    try:
        template = ChatTemplate(tokenizer, path.read_text(encoding="utf-8"))
        template.render([{"role": "user", "content": "?"}])
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not UTF-8 text") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{flag} {path}, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, *_FAULTS):
        return template  # it wants other messages than this one
    return template
