"""What every side of a benchmark offers, and which packages and module each implementation is in."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Protocol

from mambacus.measuring.cases import Case
from mambacus.runtime.errors import UserError

Step = Callable[[], object]

_MODULES = {"mambacus": "mambacus.measuring.ours", "llama.cpp": "mambacus.measuring.llama_cpp"}
_PACKAGES = {"llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}}  # module: distribution


class Side(Protocol):
    """One implementation with a model of random weights, ready for the steps of a case.

    Attributes:
        weights_bytes: bytes of its weights.
        read_bytes: of these, what every pass reads: all but an untied embedding, of which it reads single rows.
    """

    weights_bytes: int
    read_bytes: int

    def prefill(self) -> Step:
        """Return a pass over the prompt that gives logits and a state to go on from."""

    def decode(self) -> Step:
        """Return ``new_tokens`` greedy steps that begin after the prompt."""

    def generate(self, new_tokens: int) -> Step:
        """Return a run from the prompt to its last new token, of which reading the prompt gives the first."""

    def train(self) -> Step:
        """Return a forward and backward pass with the logits of every token."""

    def state_bytes(self) -> int | None:
        """Return the bytes of the state or cache that the last step left, None if it left none."""

    def facts(self) -> dict[str, object]:
        """Return what else a row should say of this side."""


def make_side(case: Case) -> Side:
    """Build the implementation of ``case`` on its device."""
    module = importlib.import_module(_MODULES.get(case.implementation, "mambacus.measuring.huggingface"))
    side: Side = module.make(case)
    return side


def require(implementations: Iterable[str]) -> None:
    """Make sure, before long work, that the packages of all implementations are there.

    Raises:
        UserError: naming those that are missing and how to get them.
    """
    missing = [
        distribution
        for name in implementations
        for module, distribution in _PACKAGES.get(name, {}).items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise UserError(f"--implementations: {', '.join(missing)} not installed; pip install 'mambacus[peers]'")
