"""What `mambacus bench` measured: speed and memory side by side, and the scan alone against its limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mambacus.reporting.charts import Figure, Series, Value, make_chart
from mambacus.reporting.eval_speed import is_evaluation
from mambacus.reporting.formats import count, energy, finite, fixed, milliseconds, percent, rate, reference, size
from mambacus.reporting.scales import log_scale, steps_scale
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, filled, make_table

CURVE_LENGTHS = 3  # sequence lengths from which a curve says more than a table


@dataclasses.dataclass(frozen=True)
class Timing:
    """One measured case: its record and its row, with the keys of ``bench`` records."""

    source: Source
    row: dict[str, Any]

    @property
    def who(self) -> str:
        """The implementation, with ``graph`` where it replayed a recorded graph."""
        return str(self.row["implementation"]) + (", graph" if self.row.get("graph") else "")

    @property
    def case(self) -> tuple[Any, ...]:
        """What must be equal for two implementations to be compared."""
        keys = ("benchmark", "model", "dtype", "batch", "seqlen", "new_tokens", "method", "logits", "samples")
        return (self.source.number, *(self.row.get(key) for key in keys))


def timings(sources: Sequence[Source]) -> list[Timing]:
    """Return the rows that time a benchmark; ``benchmarks/gpu_training.py`` names its cases ``train:130m:8x2048``."""
    found = []
    for source in of_kind(sources, "bench"):
        for row in source.record.results.get("rows", []):
            if is_timing(row):
                found.append(Timing(source, row))
            elif is_training_case(row):
                found.append(Timing(source, _from_case(row)))
    return found


def is_timing(row: dict[str, Any]) -> bool:
    """Return whether a bench row times passes of a model; that of an evaluation has its own table."""
    return "benchmark" in row and not is_evaluation(row)


def is_training_case(row: dict[str, Any]) -> bool:
    """Return whether a bench row is a case of ``benchmarks/gpu_training.py``."""
    return "case" in row and "ms" in row


def is_scan(row: dict[str, Any]) -> bool:
    """Return whether a bench row times the selective scan alone."""
    return "shape" in row and "forward_ms" in row


def _from_case(row: dict[str, Any]) -> dict[str, Any]:
    """Return a case of the training script as a row of ``bench``; ``lora-graph`` is LoRA as a recorded graph.

    Words after the shape say how the scan's backward pass ran.
    """
    name, model, shape, *ways = row["case"].split(":")
    batch, seqlen = map(int, shape.split("x"))
    kind = name.removesuffix("graph").removesuffix("-")
    return {
        "benchmark": kind if kind not in ("", "lora") else "train", "graph": name.endswith("graph"),
        "method": "lora" if kind == "lora" else "full", "implementation": ", ".join(["mambacus", *ways]),
        "model": model, "dtype": "bfloat16" if kind == "prefill" else "mixed", "batch": batch, "seqlen": seqlen,
        "median_ms": row["ms"], "tokens_per_second": row["tokens_per_second"],
        "peak_memory_bytes": row["peak_gib"] * 2**30,
    }  # fmt: skip


def speed_table(rows: Sequence[Timing]) -> Table:
    """Bench rows side by side; the ratio is against the slowest of several measured in the same case."""
    speeds: dict[tuple[Any, ...], list[float]] = {}
    for one in rows:
        if speed := finite(one.row.get("tokens_per_second")):
            speeds.setdefault(one.case, []).append(speed)
    slowest = {case: min(found) for case, found in speeds.items() if len(found) > 1}
    columns = (
        "Benchmark", "Implementation", "dtype", "#Batch × tokens", "#Median", "#Tokens/s", "#Ratio", "#Peak memory",
        "#State or cache", "#FLOPs", "#Of the limit", "#Energy", "Device",
    )  # fmt: skip
    return filled(make_table("speed", columns, (_speed_row(one, slowest.get(one.case)) for one in rows)))


def _speed_row(one: Timing, slowest: float | None) -> list[Cell | str]:
    row = one.row
    rows = f"1 → {row['samples']}" if row.get("samples") else f"{row['batch']:,}"
    shape = f"{rows} × {row['seqlen']:,}" + (f" + {row['new_tokens']:,}" if row.get("new_tokens") else "")
    name = " ".join([str(row["benchmark"]), *(["LoRA"] if row.get("method") == "lora" else [])])
    head: list[Cell | str] = [
        Cell(name, f"{row.get('model', one.source.label)}{reference([one.source.number])}"),
        one.who, str(row["dtype"]), shape,
    ]  # fmt: skip
    if row.get("error"):
        return [*head, Cell(str(row["error"]), style="error"), *[""] * 7, str(row.get("device", ""))]
    samples = [float(ms) for ms in row.get("samples_ms", [])]
    spread = f"{fixed(min(samples), ',.1f')} to {fixed(max(samples), ',.1f')}, {len(samples)} runs" if samples else ""
    ratio = finite(float(row["tokens_per_second"]) / slowest) if slowest else None
    return [
        *head,
        Cell(milliseconds(row["median_ms"]), spread),
        rate(row["tokens_per_second"]),
        Cell("–") if ratio is None else Cell(f"{ratio:.2f} ×", style="best" if ratio > 1 else ""),
        size(row.get("peak_memory_bytes")),
        size(row.get("state_bytes")),
        count(row.get("flops")),
        percent(row.get("of_least")),
        energy(row.get("energy_joules")),
        str(row.get("device", "")),
    ]


_CEILINGS = {
    "copy_gb_s": ("Copy", 1e9, "B/s"),
    "float32_gemm_gflop_s": ("float32 products", 1e9, "FLOP/s"),
    "bfloat16_gemm_gflop_s": ("bfloat16 products", 1e9, "FLOP/s"),
    "exponentials_per_s": ("Exponentials", 1.0, "/s"),
}


def ceiling_table(sources: Sequence[Source]) -> Table:
    """What the machine can do at most, as measured in the same run: what limits are computed from."""
    body: list[list[Cell | str]] = []
    for source in of_kind(sources, "bench"):
        if found := source.record.results.get("ceilings"):
            machine = str(source.record.environment.get("gpu") or source.record.environment.get("cpu"))
            cells = [_ceiling(found.get(key), unit, name) for key, (_, unit, name) in _CEILINGS.items()]
            body.append([Cell(source.label, source.mark), Cell(machine, style="shape"), *cells])
    columns = ("Record", "Machine", *(f"#{title}" for title, _, _ in _CEILINGS.values()))
    about = "A large copy (bytes read and written) and large matrix products, timed before the cases of the record."
    return filled(make_table("ceilings", columns, body, title="What the machine can do", about=about))


def _ceiling(value: Any, unit: float, name: str) -> str:
    found = finite(value)
    return "–" if found is None else f"{count(found * unit)}{name}"


def scan_rows(sources: Sequence[Source]) -> list[tuple[Source, dict[str, Any]]]:
    """Return the rows that time the selective scan alone."""
    return [
        (source, row)
        for source in of_kind(sources, "bench")
        for row in source.record.results.get("rows", [])
        if is_scan(row)
    ]


def scan_table(rows: Sequence[tuple[Source, dict[str, Any]]]) -> Table:
    """The scan's times, beside them the limit it cannot pass, mamba-ssm's time where known, and the error."""
    columns = (
        "Shape", "dtype", "#Forward", "#Both directions", "#Limit, forward", "#mamba-ssm, forward", "#mamba-ssm, both",
        "#Memory", "#Worst relative error",
    )  # fmt: skip
    return filled(
        make_table("scan", columns, (_scan_row(*row) for row in rows), title="The selective scan alone", about=_SCAN)
    )


_SCAN = (
    "Shapes are batch × channels × tokens. The limit is the larger of two: bytes over the copy bandwidth, and "
    "exponentials over their throughput, both measured in the same run. The error is the worst of the outputs and "
    "gradients against float64: of every number of the timed passes, or of a part of that shape, as older records "
    "have it. The times of mamba-ssm were measured on an H100 in another run, for the same shapes."
)


def _scan_row(source: Source, row: dict[str, Any]) -> list[Cell | str]:
    limit, forward = _limit(row), float(row["forward_ms"])
    peer = row.get("mamba_ssm_h100_ms") or (None, None)
    errors = [float(value) for value in row.get("errors", {}).values()]
    return [
        Cell(" × ".join(f"{part:,}" for part in row["shape"]), source.mark, "shape"),
        str(row["dtype"]),
        Cell(milliseconds(forward), _times(forward, limit, "of the limit")),
        Cell(milliseconds(row.get("both_ms"))),
        milliseconds(limit),
        Cell(milliseconds(peer[0]), _times(peer[0], forward, "ours")),
        Cell(milliseconds(peer[1]), _times(peer[1], row.get("both_ms"), "ours")),
        size(row.get("memory_bytes")),
        _worst(errors, "" if not errors or "checked_shape" in row else "of a part"),
    ]


def _worst(errors: Sequence[float], note: str) -> Cell:
    if not all(map(math.isfinite, errors)):
        return Cell("infinite", note, style="error")
    return Cell(fixed(max(errors, default=None), ".1e"), note)


def _limit(row: dict[str, Any]) -> float | None:
    found = [float(row[key]) for key in ("bytes_limit_ms", "exponentials_limit_ms") if row.get(key) is not None]
    return max(found, default=None)


def _times(value: Any, unit: Any, what: str) -> str:
    one, other = finite(value), finite(unit)
    return "" if one is None or not other else f"{one / other:.2f} × {what}"


def scan_figures(rows: Sequence[tuple[Source, dict[str, Any]]]) -> list[Figure]:
    """Return one figure per batch, channels and dtype that was measured at several lengths."""
    groups: dict[tuple[Any, ...], list[tuple[Source, dict[str, Any]]]] = {}
    for source, row in rows:
        groups.setdefault((source.number, *row["shape"][:2], row["dtype"]), []).append((source, row))
    figures = []
    for (record, batch, channels, dtype), members in groups.items():
        if len({row["shape"][2] for _, row in members}) < CURVE_LENGTHS:
            continue
        series = [one for one in _scan_series([row for _, row in members]) if one.values]
        across = steps_scale((row["shape"][2] for _, row in members), _length)
        up = log_scale((value.y for one in series for value in one.values), milliseconds)
        title = f"Selective scan over length: batch {batch}, {channels:,} channels, {dtype}"
        chart = make_chart("Time", ("tokens", across), ("", up), series)
        figures.append(Figure(f"scan {record} {batch} {channels} {dtype}", title, (chart,), (record,)))
    return figures


def _scan_series(rows: Sequence[dict[str, Any]]) -> list[Series]:
    def series(label: str, colour: int, values: Sequence[float | None], dashed: bool = False) -> Series:
        points = [
            Value(row["shape"][2], ms, f"{label}\n{row['shape'][2]:,} tokens: {milliseconds(ms)}")
            for row, ms in zip(rows, values, strict=True)
            if ms is not None
        ]
        return Series(label, colour, tuple(sorted(points, key=lambda value: value.x)), dashed=dashed)

    peers = [row.get("mamba_ssm_h100_ms") or (None, None) for row in rows]
    return [
        series("forward", 1, [finite(row["forward_ms"]) for row in rows]),
        series("forward and backward", 3, [finite(row.get("both_ms")) for row in rows]),
        series("limit, forward", 0, [_limit(row) for row in rows], dashed=True),
        series("mamba-ssm on H100, forward", 2, [peer[0] for peer in peers], dashed=True),
        series("mamba-ssm on H100, forward and backward", 4, [peer[1] for peer in peers], dashed=True),
    ]


def _length(value: float) -> str:
    return f"{value:,.0f}"
