"""A compiled prompt in use: the model that begins from its state, and how questions are put to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mambacus.models.primed import PrimedModel
from mambacus.models.state_files import read_state
from mambacus.prompts.prompt import Prompt, joined, query_tokens
from mambacus.runtime.errors import UserError


def prime(path: Path, model: nn.Module, tokenizer: Any, questions: Sequence[str]) -> tuple[PrimedModel, Prompt]:
    """Return the model that begins from a state file, and the prompt whose queries it is asked with.

    Args:
        path: a file of ``prompt compile`` or ``prompt tune``.
        model: with its adapter, if the state was made with one.
        tokenizer: the model's.
        questions: all that will be asked; each must be cut into the tokens that it has in the whole prompt.

    Raises:
        UserError: as `read_state`; the file holds no prompt; or the tokenizer joins its end with a question.
    """
    file = read_state(path, model, tokenizer)
    if file.prompt is None:
        raise UserError(f"--state {path}: does not say how a question is put; make it with prompt compile")
    prompt = Prompt.from_dict(file.prompt, f"--state {path}")
    for question in questions:
        if query_tokens(prompt, file.token_ids, tokenizer, question) is None:
            raise UserError(f"--state {path}: {joined(prompt, question)}")
    return PrimedModel(model, file.state), prompt
