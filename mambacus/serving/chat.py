"""From a conversation to a prompt: the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambacus.runtime.errors import UserError

NO_TEMPLATE = "the model's tokenizer has no chat template; give --chat-template FILE.jinja, or complete plain prompts"


class Chat:
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
            text: str = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template does not take these messages: {error}") from None
        return text
