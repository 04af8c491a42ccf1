"""What `mambacus bench eval` measured: the time of an evaluation with and without reused states, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambacus.reporting.formats import duration, finite, rate, reference, show, size, whole
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, filled, make_table


def is_evaluation(row: dict[str, Any]) -> bool:
    """Return whether a row of a bench record times an evaluation."""
    return row.get("benchmark") == "eval"


def eval_table(sources: Sequence[Source]) -> Table:
    """One row per task and implementation."""
    columns = (
        "Task", "Implementation", "dtype", "#Documents", "#Answering", "#Documents/s", "#Tokens read",
        "#Ours is faster", "#Same answers", "Metrics", "#Peak memory", "Device",
    )  # fmt: skip
    body = [
        _row(source, row)
        for source in of_kind(sources, "bench")
        for row in source.record.results.get("rows", [])
        if is_evaluation(row)
    ]
    return filled(make_table("evaluation-speed", columns, body, title="Evaluation", about=_ABOUT))


_ABOUT = (
    "The same documents of each task; “answering” leaves out loading the model and making the requests. “Tokens read” "
    "stands over what reading every request whole would take. A slow side answers fewer documents, and the factor is "
    "that of documents a second."
)


def _row(source: Source, row: dict[str, Any]) -> list[Cell | str]:
    shots = f"{row['num_fewshot']}-shot, " if row.get("num_fewshot") is not None else ""
    head: list[Cell | str] = [
        Cell(str(row.get("task", "")), f"{shots}{row.get('model', source.label)}{reference([source.number])}"),
        str(row["implementation"]), str(row.get("dtype", "")),
    ]  # fmt: skip
    if row.get("error"):
        return [*head, "", Cell(str(row["error"]), style="error"), *[""] * 6, str(row.get("device", ""))]
    read, naive = row.get("tokens_read"), row.get("tokens_naive")
    metrics = row.get("metrics") or {}
    speedup, compared = row.get("speedup"), row.get("compared_documents")
    return [
        *head,
        whole(row.get("documents")),
        duration(row.get("seconds")),
        rate(row.get("documents_per_second")),
        Cell(whole(read), f"of {whole(naive)}" if naive is not None else ""),
        "–" if finite(speedup) is None else f"{speedup:.2f} ×",
        "–" if compared is None else f"{whole(row.get('same_documents'))} of {whole(compared)}",
        ", ".join(f"{metric} {show(metric, value)}" for metric, value in metrics.items()) or "–",
        size(row.get("peak_memory_bytes")),
        str(row.get("device", "")),
    ]
