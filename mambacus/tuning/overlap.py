"""Training rows that hold pieces of an evaluation set: found by shared runs of thirteen words, left out and listed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

N_GRAM = 13
_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Return the words and numbers of ``text`` in lower case, without punctuation."""
    return _WORD.findall(text.lower())


class OverlapFilter:
    """Knows all runs of `N_GRAM` words of some texts; a text with fewer words counts as one run if it has at least six.

    Source: 13-gram overlap as in Brown et al. 2020, arXiv 2005.14165, appendix C.

    Args:
        texts: name -> questions of the evaluation sets.
    """

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self._runs: dict[int, str] = {}
        self._short: dict[int, dict[int, str]] = {}  # length -> runs
        for name, text in texts:
            found = words(text)
            if len(found) >= N_GRAM:
                self._runs.update(dict.fromkeys(_runs(found, N_GRAM), name))
            elif len(found) >= 6:
                self._short.setdefault(len(found), {})[hash(tuple(found))] = name

    def find(self, text: str) -> str | None:
        """Return the name of a set that ``text`` shares a run with, None if there is none."""
        found = words(text)
        for length, runs in ((N_GRAM, self._runs), *self._short.items()):
            for run in _runs(found, length):
                if run in runs:
                    return runs[run]
        return None


def _runs(found: list[str], length: int) -> Iterator[int]:
    return (hash(tuple(found[start : start + length])) for start in range(len(found) - length + 1))
