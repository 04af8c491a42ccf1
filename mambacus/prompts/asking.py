"""A compiled prompt in use: the model that begins from its state, and how questions are put to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mambacus.models.primed import PrimedModel
from mambacus.models.state_files import StateFile, read_state
from mambacus.prompts.prompt import Prompt, check_border
from mambacus.runtime.errors import UserError


def prime(path: Path, model: nn.Module, tokenizer: Any, questions: Sequence[str]) -> tuple[PrimedModel, Prompt]:
    """Return the model that begins from a state file, and the prompt in whose frame it is asked.

    Args:
        path: a file of ``prompt compile`` or ``prompt tune``.
        model: with its adapter, if the state was made with one.
        tokenizer: the model's.
        questions: all that will be asked; each must be cut into the tokens that it has in the whole prompt.

    Raises:
        UserError: as `read_state` and `asked_with`.
    """
    file = read_state(path, model, tokenizer)
    return PrimedModel(model, file.state), asked_with(path, file, tokenizer, questions)


def asked_with(path: Path, file: StateFile, tokenizer: Any, questions: Iterable[str]) -> Prompt:
    """Return the prompt that a state file was compiled from.

    Args:
        path: of the file, for messages.
        file: its content.
        tokenizer: the model's.
        questions: all that will be asked; each must be cut into the tokens that it has in the whole prompt.

    Raises:
        UserError: the file holds no prompt; or the tokenizer joins its end with a question.
    """
    if file.prompt is None:
        raise UserError(f"--state {path}: does not say how a question is put; make it with prompt compile")
    prompt = Prompt.from_dict(file.prompt, f"--state {path}")
    for question in questions:
        try:
            check_border(prompt, file.token_ids, tokenizer, question)
        except UserError as error:
            raise UserError(f"--state {path}: {error}") from None
    return prompt
