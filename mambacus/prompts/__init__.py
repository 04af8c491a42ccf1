"""Prompts as values: their text, the space they are searched in, the search, and the state they compile to."""

from mambacus.prompts.prompt import DEFAULT, Exemplar, Prompt, read_prompt, write_prompt

__all__ = ["DEFAULT", "Exemplar", "Prompt", "read_prompt", "write_prompt"]
