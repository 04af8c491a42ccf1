"""The progress of a search on the terminal: the current leaders, redrawn after each rung."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mambacus.prompts.prompt import Prompt
from mambacus.prompts.search import Rung, Standing

LEADERS = 5


def summary(prompt: Prompt) -> str:
    """Return a prompt in a few words: examples, frame and instruction."""
    frame = " ".join(prompt.question.split())
    return f"{len(prompt.exemplars)}-shot, {frame!r}" + (f", {prompt.instruction!r}" if prompt.instruction else "")


class Board:
    """Shows rungs on standard error: a live table on a terminal, a line each elsewhere.

    Args:
        rounds: of the search.
        tokens: returns the forward tokens so far.
    """

    def __init__(self, rounds: int, tokens: Callable[[], int]) -> None:
        self._rounds, self._tokens = rounds, tokens
        self._live: Any = None

    def __enter__(self) -> Board:
        """Begin to draw."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the last table standing."""
        if self._live is not None:
            self._live.stop()

    def tell(self, rung: Rung) -> None:
        """Show a rung that was just finished."""
        head = f"round {rung.round} of {self._rounds}, {rung.prompts} prompts on {rung.items} problems"
        tokens = f"{self._tokens():,} tokens so far"
        if self._live is None:
            best = rung.standings[0]
            print(f"{head}: best {best.mean:.2f} ({summary(best.prompt)}); {tokens}", file=sys.stderr)
            return
        self._live.update(_table(f"{head}; {tokens}", rung.standings[:LEADERS]), refresh=True)


def _table(title: str, standings: tuple[Standing, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in ("score", "shots", "from", "frame", "instruction"):
        table.add_column(column)
    for standing in standings:
        prompt = standing.prompt
        cells = (
            f"{standing.mean:.2f}", str(len(prompt.exemplars)), standing.origin, repr(prompt.question),
            prompt.instruction,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table
