"""Finding records: files and folders on the command line -> the records a page is made from."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, read_json, read_jsonl, read_record

# kind of record -> what its results hold at least, and as what; other kinds are listed, not drawn
RESULTS: dict[str, dict[str, type]] = {
    "evaluate": {"tasks": dict}, "solve": {"benches": dict}, "finetune": {"train": dict}, "pretrain": {"train": dict},
    "bench": {}, "study": {"steps": list, "models": list}, "merge": {}, "info": {}, "generate": {},
    "chat": {}, "serve-soak": {},
    "convert": {}, "report": {}, "prompt": {"search": dict, "finals": dict, "test": dict}, "prompt-compile": {},
    "prompt-tune": {"train": dict}, "prompt-states": {"rows": dict}, "state-arithmetic": {"rows": dict},
    "evaluation-parity": {"rows": list},
    "sweep": {"axes": list, "runs": list}, "controlled": {"rows": list, "summary": list, "predictions": list},
    "tied-merge": {"rows": list},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """One record and where it lies.

    Attributes:
        number: its number on the page, from 1; figures refer to it.
        path: the JSON file.
        record: what the file holds.
        label: the model's name on the page: the study's, where a study made the record, else the record's own.
        command: the one command that makes the record.
    """

    number: int
    path: Path
    record: Record
    label: str
    command: str

    @property
    def mark(self) -> str:
        """Its number as the page shows it: ``[3]``."""
        return f"[{self.number}]"

    @functools.cached_property
    def items(self) -> list[dict[str, Any]]:
        """The item-level outputs beside the record, in file order; empty when the record has none.

        Raises:
            UserError: the record names an items file that is missing or broken.
        """
        if self.record.items_file is None:
            return []
        return [row for _, row in read_jsonl(self.path.parent / self.record.items_file)]


def collect(paths: Iterable[str | Path]) -> list[Source]:
    """Read the records named by files and found below folders, each file once, in the order given.

    A folder is searched for ``*.json`` at any depth; JSON files in it that are not records (a model's ``config.json``)
    are passed over. So are the records of pages, also those named, so that ``gpu-*.json`` may match the page's own.

    Raises:
        UserError: nothing there, a named file is not a record, a folder holds none, or all are records of pages.
    """
    found: dict[Path, Record] = {}
    pages: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = {file: _read(file) for file in sorted(path.rglob("*.json")) if _looks_like_record(file)}
            drawable = {file: record for file, record in inside.items() if record.kind != "report"}
            if not drawable:
                raise UserError(f"{path}: expected records of mambacus commands in this folder, found none")
            for file, record in drawable.items():
                found.setdefault(file.resolve(), record)
            continue
        record = _read(path)
        if record.kind == "report":
            pages.append(path)
        else:
            found.setdefault(path.resolve(), record)
    if not found and pages:
        raise UserError(f"{pages[0]}: expected the record of a measurement, got that of a report")
    if not found:
        raise UserError("expected at least one record file or folder, got none")
    steps = _study_steps(found)
    return [
        Source(
            number,
            path,
            record,
            label=steps.get(path, {}).get("label", record.label),
            command=steps.get(path, {}).get("command", shlex.join(record.command)),
        )
        for number, (path, record) in enumerate(found.items(), start=1)
    ]


def shown_path(source: Source, folder: Path) -> str:
    """Return where a record lies as seen from ``folder``, or its whole path where it is not below it."""
    folder = folder.resolve()
    return str(source.path.relative_to(folder) if source.path.is_relative_to(folder) else source.path)


def _read(path: Path) -> Record:
    """Read a record and check that its results are those of its kind, if that is one that this version draws.

    Raises:
        UserError: as `read_record`, or other results than those of its kind.
    """
    record = read_record(path)
    record = dataclasses.replace(record, results=_numbers(record.results), seconds=_numbers(record.seconds))
    for name, kind in RESULTS.get(record.kind, {}).items():
        if not isinstance(record.results.get(name), kind):
            got = f"a {type(record.results[name]).__name__}" if name in record.results else "nothing"
            raise UserError(f"{path}: results of {record.kind}: {name}: expected a {kind.__name__}, got {got}")
    return record


def _numbers(value: Any) -> Any:
    """Return results with the numbers that JSON lacks, which records spell as words, as numbers again."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _study_steps(found: dict[Path, Record]) -> dict[Path, dict[str, str]]:
    """Return record path -> the step that made it, from the study records among ``found``."""
    return {
        (path.parent / step["record"]).resolve(): step
        for path, record in found.items()
        if record.kind == "study"
        for step in record.results["steps"]
    }


def of_kind(sources: Iterable[Source], kind: str) -> list[Source]:
    """Return the sources whose record is of ``kind`` (``evaluate``, ``solve`` ...)."""
    return [source for source in sources if source.record.kind == kind]


def _looks_like_record(path: Path) -> bool:
    try:
        raw = read_json(path)
    except UserError:  # some other JSON file, or a folder so called
        return False
    return {"kind", "schema", "results", "environment"} <= set(raw)
