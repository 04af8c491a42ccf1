"""``mambacus prompt optimise|compile|tune``: search a prompt, compile one into a state, tune that state by gradient."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mambacus.runtime.errors import UserError, suggest

ACTIONS = {
    "optimise": "search instruction, frame, worked examples and their order on a training slice; confirm on test",
    "compile": "read a prompt once and keep the state: generate, chat, serve, solve and evaluate take it as --state",
    "tune": "tune a compiled state by gradient, the model frozen",
}


def usage() -> str:
    """Return the text of ``mambacus prompt --help``."""
    lines = "\n".join(f"  {action:<9} {text}" for action, text in ACTIONS.items())
    return f"usage: mambacus prompt ACTION [flags]      mambacus prompt ACTION --help for its flags\n\n{lines}\n"


def main(argv: Sequence[str]) -> None:
    """Run one action."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        if argv:
            return
        raise UserError(f"expected one of {', '.join(ACTIONS)}")
    action, *rest = argv
    if action not in ACTIONS:
        raise UserError(f"unknown action {action!r}: expected one of {', '.join(ACTIONS)}{suggest(action, ACTIONS)}")
    importlib.import_module(f"mambacus.prompt_{action}").main(rest)
