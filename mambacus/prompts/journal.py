"""A journal of measurements: one JSON line each, appended at once, so that a killed search goes on where it was.

A search is a function of its settings and of the scores it is told; replayed with the scores of its journal it comes to
the same place without reading a token.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mambacus.prompts.prompt import Prompt
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import fingerprint
from mambacus.runtime.records import parse_line


def prompt_key(prompt: Prompt) -> str:
    """Return the name of a prompt in a journal."""
    return fingerprint(prompt.as_dict())


class Journal:
    """The measurements of one search on disk.

    Args:
        path: the file.
        identity: the settings that decide the measurements; those of another run are refused.
        resume: go on with an existing file.

    Attributes:
        replayed: measurements taken from the file so far.

    Raises:
        UserError: the file exists and ``resume`` is off, is another run's, or is broken other than at its very end.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.replayed = 0
        self._entries: dict[str, dict[str, Any]] = {}
        mine = json.loads(json.dumps(identity, default=str))
        if path.exists():
            if not resume:
                raise UserError(f"--out {path}: holds a search already; add --resume to continue it or --overwrite")
            whole = self._whole_lines()
            if whole:
                self._take(whole, mine)
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self._append({"identity": mine})

    def _whole_lines(self) -> list[str]:
        """Return the lines of the file, and cut off a last one that a kill left incomplete."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))
        return whole.decode("utf-8", errors="replace").split("\n")[:-1]  # other line ends may stand in a text

    def _take(self, lines: list[str], mine: dict[str, Any]) -> None:
        rows = [parse_line(line, f"{self.path}, line {number}") for number, line in enumerate(lines, start=1)]
        theirs = rows[0].get("identity", {})
        changed = sorted(key for key in {*theirs, *mine} if theirs.get(key) != mine.get(key))
        if changed:
            raise UserError(f"--out {self.path}: holds another search (differs in {', '.join(changed)})")
        for number, row in enumerate(rows[1:], start=2):
            if not isinstance(row.get("key"), str):
                raise UserError(f"{self.path}, line {number}: expected a measurement with a key, got {row!r}"[:300])
            self._entries[row["key"]] = row

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the measurement called ``key``, or None."""
        entry = self._entries.get(key)
        self.replayed += entry is not None
        return entry

    def add(self, key: str, values: dict[str, Any]) -> None:
        """Keep a measurement."""
        self._entries[key] = {"key": key, **values}
        self._append(self._entries[key])

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
