"""What of the records the page does not draw, with the reason: nothing is left out without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mambacus.reporting.eval_speed import is_evaluation
from mambacus.reporting.gpu_scripts import is_decode_case, is_processes_case
from mambacus.reporting.sources import Source
from mambacus.reporting.speed import is_scan, is_timing, is_training_case
from mambacus.reporting.table import Cell, Table, make_table

_REASONS = {
    "study": "it names the models and steps of a study; the figures are in the steps' own records",
    "bench": "it holds no measured case that a section draws",
    "info": "it describes a model and measures nothing",
    "generate": "it holds texts, not a measurement",
    "chat": "it holds a conversation, not a measurement",
    "convert": "it says which files were converted and measures nothing",
    "prompt-compile": "it says which state was written and measures nothing",
}
_MARK = re.compile(r"\[(\d+)\]")


def mentioned(cells: Iterable[Cell]) -> set[int]:
    """Return the numbers of the records that some cells refer to."""
    return {int(number) for cell in cells for number in _MARK.findall(f"{cell.text} {cell.note}")}


def empty_notice(sources: Sequence[Source], drawn: set[int]) -> tuple[str, ...]:
    """Return a sentence on records of measurements without a figure on the page; what measures nothing needs none."""
    measures = [source for source in sources if source.record.kind == "bench" or source.record.kind not in _REASONS]
    empty = [source for source in measures if source.number not in drawn]
    if not empty:
        return ()
    named = ", ".join(f"{source.mark} {source.path.name}" for source in empty)
    return (f"Nothing is drawn of {named}: see “Not drawn” for the reason.",)


def undrawn_table(sources: Sequence[Source], drawn: set[int]) -> Table:
    """Every record, or part of one, without a figure on the page.

    Args:
        sources: the records.
        drawn: numbers of the records that a table or plot refers to.
    """
    body: list[list[Cell | str]] = []
    for source in sources:
        reason = _reason(source, source.number in drawn)
        if reason:
            body.append([source.mark, Cell(source.record.kind, source.label), reason])
    about = "These records, or these rows of them, were read and have no figure above."
    return make_table("undrawn", ("", "Record", "Why not"), body, title="Not drawn", about=about)


def _reason(source: Source, drawn: bool) -> str:
    if not drawn:
        kind = source.record.kind
        return _REASONS.get(kind, f"records of kind {kind} have no part on a page of this version")
    if source.record.kind != "bench":
        return ""
    rows = [row for row in source.record.results.get("rows", []) if not _known(row)]
    names = ", ".join(dict.fromkeys(str(row.get("case") or row.get("benchmark") or "unnamed") for row in rows))
    return f"{len(rows):,} rows of another kind than a section draws: {names}" if rows else ""


def _known(row: dict[str, Any]) -> bool:
    kinds = (is_timing, is_evaluation, is_training_case, is_scan, is_decode_case, is_processes_case)
    return any(takes(row) for takes in kinds)
