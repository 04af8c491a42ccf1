"""A table as plain text cells, so that the page, its CSV download, Markdown, LaTeX and tests read the same values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller second line, and a style (``better``, ``worse``, ``best``, ``code`` ...)."""

    text: str
    note: str = ""
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: used for the files.
        columns: headings; a leading ``#`` marks a column of numbers (aligned right, the ``#`` is not shown).
        rows: cells, one list per row.
        title: heading on the page, where a section holds several tables.
        about: a sentence over the table.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    about: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [column.startswith("#") for column in self.columns]

    @property
    def headings(self) -> list[str]:
        """The columns as readers see them."""
        return [column.removeprefix("#") for column in self.columns]


def make_table(
    name: str, columns: Sequence[str], rows: Iterable[Iterable[Cell | str]], *, title: str = "", about: str = ""
) -> Table:
    """Return a table of cells and plain strings."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Table(name, tuple(columns), cells, title, about)


def filled(table: Table) -> Table:
    """Return the table without the columns that say nothing (empty or a dash) in every row."""
    kept = [
        place
        for place in range(len(table.columns))
        if any(row[place].text not in ("", "–") for row in table.rows) or not table.rows
    ]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return dataclasses.replace(table, columns=tuple(table.columns[place] for place in kept), rows=rows)
