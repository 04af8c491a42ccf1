"""Finished rows on disk while a benchmark runs, so that a killed one can go on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mambacus.measuring.cases import Case
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import fingerprint
from mambacus.runtime.records import parse_line


def journal_path(record: Path) -> Path:
    """Return the file of finished rows: beside the record, named after it."""
    return record.with_name(f"{record.stem}.rows.jsonl")


class RowJournal:
    """Rows by their case, one JSON line each, appended as they come.

    Args:
        path: the file; made with its folder when the first row comes.
        resume: take the rows that are there.
        overwrite: throw them away.

    Raises:
        UserError: the file exists and neither is asked for, or a line is broken other than the last.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        if not resume and not overwrite:
            raise UserError(
                f"{path}: holds the rows of a run that did not end; add --resume to go on or --overwrite to start again"
            )
        if not resume:
            path.unlink()
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill can leave half a line
        path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            entry = parse_line(line, f"{path}, line {number}")
            self._rows[entry["case"]] = entry["row"]

    def find(self, case: Case) -> dict[str, Any] | None:
        """Return the row of a case that an earlier run finished."""
        return self._rows.get(_key(case))

    def add(self, case: Case, row: dict[str, Any]) -> None:
        """Keep a finished row."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # as for the record
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"case": _key(case), "row": row}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the file: its rows are in the record."""
        self._path.unlink(missing_ok=True)


def _key(case: Case) -> str:
    return fingerprint(dataclasses.asdict(case))
