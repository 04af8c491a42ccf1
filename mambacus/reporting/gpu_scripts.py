"""What the GPU scripts in ``benchmarks/`` measured: the one-token step, training step by step, launches of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mambacus.reporting.formats import fixed, milliseconds, percent, rate, size
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.table import Cell, Table, filled, make_table

NAME_LENGTH = 60  # characters shown of a kernel's name; those of templates go on for hundreds
LONGEST = 3  # kernels of a step that are named
# first words of the cases of ``gpu_decode_step.py``
DECODING = ("step", "prefill", "engine", "host", "check", "kernels")

_ENGINE = (
    "Engine.generate from its prompts to the last token, median of three runs: tokens a second count the reading of the"
    " prompts, milliseconds a token do not."
)
_HOST = (
    "What a decoded token costs the host by the way it is chosen: medians of seven runs after the first. A token of all"
    " rows takes the host's work and its waiting for the GPU; where it hardly waits, the host is the limit."
)
_STEP = (
    "One token of every row, as the decoder replays it. “Fused” are the kernels of a step as they are chosen; “modules”"
    " is the model's own code as a graph. The limit is the time in which the measured copy bandwidth moves every weight"
    " once and the states twice. “Wide” are kernels that were tried for 49 to 128 rows and taken out again."
)
_PREFILL = (
    "A prompt of every row read at once, as it is (“eager”) and from a recorded graph: the host's part and the whole."
)
_CHECK = (
    "Errors of one step against float64, relative to the norm: the fused kernels beside the model's modules, both in"
    " bfloat16."
)
_KERNELS = "Each kernel alone over all layers: as chosen, the fastest of the other launches, and torch's product."
_PROFILE = (
    "A step beside its parts: the time in which the host had queued it, the time in which kernels ran, how many there"
    " were, and the longest of them."
)
_LAUNCHES = (
    "The fastest launch of every kernel and shape (batch × channels × tokens), and how far the others lie behind."
)


_PROCESSES = (
    "The same training on one GPU and on two, largest difference of a loss and of the saved weights; the peak is the"
    " first process's. The runs went at the same time and tell no speed."
)


def decode_cases(source: Source) -> Iterator[tuple[str, str, list[int], Any]]:
    """Yield the cases of ``gpu_decode_step.py`` in a bench record: kind, model, sizes, result."""
    for row in source.record.results.get("rows", []):
        if is_decode_case(row):
            kind, model, *sizes = row["case"].split(":")
            yield kind, model, [int(size) for size in sizes], row["result"]


def is_decode_case(row: dict[str, Any]) -> bool:
    """Return whether a row is a case of ``gpu_decode_step.py``."""
    return "result" in row and str(row.get("case", "")).split(":")[0] in DECODING


def gpu_tables(sources: Sequence[Source]) -> tuple[Table, ...]:
    """Return the tables of the GPU scripts' records."""
    found = of_kind(sources, "bench")
    return (engine_table(found), host_table(found), step_table(found), prefill_table(found), check_table(found),
            kernel_table(found), profile_table(found), launch_table(found), processes_table(found))  # fmt: skip


def _failed(head: Sequence[Cell | str], result: dict[str, Any], empty: int) -> list[Cell | str]:
    """Return the row of a case that failed: the error in place of figures, and ``empty`` cells after it."""
    return [*head, Cell(str(result["error"]), style="error"), *[""] * empty]


def engine_table(sources: Sequence[Source]) -> Table:
    """Generation from end to end: one row a case."""
    body: list[list[Cell | str]] = []
    for source, model, (rows, prompt, new), result in _cases(sources, "engine"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,}", f"{prompt:,} + {new:,}"]
        if "error" in result:
            body.append(_failed(head, result, 4))
            continue
        body.append([
            *head, rate(result["tokens_per_second"]), milliseconds(result["decode_ms_a_token"]),
            *(milliseconds(1000 * result[f"{part}seconds"]) for part in ("", "prefill_", "first_run_")),
        ])  # fmt: skip
    columns = ("Model", "#Rows", "#Prompt + new", "#Tokens/s", "#A token of all rows", "#Whole", "#Reading prompts",
               "#First run")  # fmt: skip
    return make_table("gpu-engine", columns, body, title="Generation from end to end", about=_ENGINE)


def host_table(sources: Sequence[Source]) -> Table:
    """The host's part of a decoded token: one row a case and way to choose."""
    body: list[list[Cell | str]] = []
    for source, model, (rows, prompt, new), result in _cases(sources, "host"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,}", f"{prompt:,} + {new:,}"]
        if "error" in result:
            body.append(_failed(head, result, 4))
            continue
        body += [
            [*head, way, rate(timed["tokens_per_second"]),
             *(milliseconds(timed[f"{part}_us"] / 1000) for part in ("token", "host", "waits"))]
            for way, timed in result.items()
        ]  # fmt: skip
    columns = ("Model", "#Rows", "#Prompt + new", "Tokens chosen by", "#Tokens/s", "#A token of all rows", "#Host",
               "#Waiting for the GPU")  # fmt: skip
    return make_table("gpu-host", columns, body, title="The host's part of a token", about=_HOST)


def step_table(sources: Sequence[Source]) -> Table:
    """The one-token step: one row a case and way."""
    body: list[list[Cell | str]] = []
    for source, model, (rows,), result in _cases(sources, "step"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,}"]
        if "error" in result:
            body.append(_failed([*head, ""], result, 4))
            continue
        floor = float(result["floor_ms"])
        for way, timed in result.items():
            if isinstance(timed, dict):
                name = {"few": "fused", "many": "fused, for many rows"}.get(way, way.replace("few,", "fused,"))
                body.append([
                    *head, name, milliseconds(timed["graph_ms"]), milliseconds(timed["step_ms"]),
                    milliseconds(timed["queued_ms"]), milliseconds(floor), percent(floor / timed["graph_ms"]),
                ])  # fmt: skip
    columns = ("Model", "#Rows", "Kernels", "#Graph alone", "#With the host's part", "#Queued after", "#Limit",
               "#Graph, of the limit")  # fmt: skip
    return make_table("gpu-step", columns, body, title="The one-token step", about=_STEP)


def prefill_table(sources: Sequence[Source]) -> Table:
    """The reading of prompts: one row a case and way."""
    body: list[list[Cell | str]] = []
    for source, model, (rows, prompt), result in _cases(sources, "prefill"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,} × {prompt:,}"]
        if "error" in result:
            body.append(_failed(head, result, 3))
            continue
        for way in ("eager", "graph"):
            timed, differ = result[way], result["logits_differ"] if way == "graph" else None
            body.append([
                *head, way, milliseconds(timed["host_ms"]), milliseconds(timed["wall_ms"]),
                "–" if differ is None else fixed(differ, ".2g"),
            ])  # fmt: skip
    columns = ("Model", "#Rows × tokens", "Way", "#Host", "#Whole", "#Logits differ from eager")
    return make_table("gpu-prefill", columns, body, title="Reading prompts", about=_PREFILL)


def check_table(sources: Sequence[Source]) -> Table:
    """The errors of a step: one row a case, or one for each way that it checked."""
    body: list[list[Cell | str]] = []
    for source, model, (rows,), result in _cases(sources, "check"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,}"]
        if "error" in result:
            body.append(_failed([*head, ""], result, 4))
            continue
        ways = {"": result} if "logits" in result else {way: got for way, got in result.items() if way != "right"}
        for way, got in ways.items():
            errors = [
                Cell(fixed(got[what]["fused"], ".2e"), f"modules {fixed(got[what]['modules'], '.2e')}")
                for what in ("logits", "conv_state", "ssm_state")
            ]
            body.append([
                *head, way, *errors, percent(got["same_argmax"]),
                Cell("yes" if got["right"] else "no", style="" if got["right"] else "error"),
            ])  # fmt: skip
    columns = ("Model", "#Rows", "Kernels", "#Logits", "#Convolution's state", "#State", "#Same likeliest token",
               "Passed")  # fmt: skip
    return filled(make_table("gpu-step-check", columns, body, title="The step against float64", about=_CHECK))


def kernel_table(sources: Sequence[Source]) -> Table:
    """Each kernel of the step alone: one row a case and kernel."""
    body: list[list[Cell | str]] = []
    for source, model, (rows,), result in _cases(sources, "kernels"):
        head: list[Cell | str] = [Cell(model, source.mark), f"{rows:,}"]
        if isinstance(result, dict):
            body.append(_failed(head, result, 3))
            continue
        for kernel, wide in dict.fromkeys((row["kernel"], _wide(row)) for row in result if row["what"] != "torch"):
            tried = [row for row in result if row["kernel"] == kernel]
            tried = [row for row in tried if row["what"] == "torch" or _wide(row) == wide]
            timed = [row for row in tried if "us" in row]
            failed = len(tried) - len(timed)
            torch = [row for row in timed if row["what"] == "torch"]
            ways = {_way(row["what"]): row for row in timed if row["what"] != "torch" and "projects" in row["what"]}
            if ways:
                body += [[*head, f"{kernel}, {way}", _fastest([row]), "", ""] for way, row in ways.items()]
                continue
            ours = [row for row in timed if row not in torch and row["what"].get("chosen", True)]
            others = [row for row in timed if row not in torch and row not in ours]
            name = f"{kernel}, wide" if wide else kernel
            note = f"{name} ({failed} launches failed)" if failed else name
            body.append([*head, note, *(_fastest(some) for some in (ours, others, torch))])
    columns = ("Model", "#Rows", "Kernel", "#A layer", "#Other launches", "#torch")
    return make_table("gpu-step-kernels", columns, body, title="Kernels of the step", about=_KERNELS)


def _wide(row: dict[str, Any]) -> bool:
    """Return whether a launch is one of the products through shared memory, which were taken out again."""
    return "splits" in row["what"]


def _way(what: dict[str, Any]) -> str:
    return "small projections in it" if what["projects"] else "alone"


def _fastest(rows: Sequence[dict[str, Any]]) -> Cell:
    if not rows:
        return Cell("–")
    best = min(rows, key=lambda row: float(row["us"]))
    return Cell(
        f"{fixed(best['us'], ',.2f')} µs",
        f"{fixed(best['gb_s'], ',')} GB/s" + (f", best of {len(rows)}" if len(rows) > 1 else ""),
    )


def profile_table(sources: Sequence[Source]) -> Table:
    """What ``gpu_training.py`` measured beside the time: one row a case."""
    body: list[list[Cell | str]] = []
    for source in sources:
        for row in source.record.results.get("rows", []):
            if "case" in row and "ms" in row:
                longest = row.get("kernels", [])[:LONGEST]
                named = "; ".join(f"{_short(k['name'])} {milliseconds(k['ms'])} in {k['calls']:,}" for k in longest)
                body.append([
                    Cell(row["case"], source.mark), milliseconds(row["ms"]),
                    milliseconds(row.get("queued_ms")), milliseconds(row.get("busy_ms")),
                    f"{row['launches']:,}" if "launches" in row else "–", named or "–",
                ])  # fmt: skip
    columns = ("Case", "#Median", "#Queued after", "#Kernels ran", "#Launches", "Longest kernels, in calls")
    return filled(make_table("gpu-profile", columns, body, title="Where the time of a step goes", about=_PROFILE))


def launch_table(sources: Sequence[Source]) -> Table:
    """What ``gpu_ops.py`` measured: the fastest launches, then every kernel's and every other op's time."""
    body: list[list[Cell | str]] = []
    for source in sources:
        results, mark = source.record.results, source.mark
        launches = results.get("launches", [])
        for shape, kernel in dict.fromkeys((tuple(row["shape"]), row["kernel"]) for row in launches):
            rows = [row for row in launches if (tuple(row["shape"]), row["kernel"]) == (shape, kernel)]
            timed = sorted((float(row["ms"]), row["plan"]) for row in rows if "error" not in row)
            if not timed:
                body.append([_shape(shape, mark), f"scan, {kernel}", "–", Cell("no launch ran", style="error")])
                continue
            plan = ", ".join(map(str, timed[0][1]))
            spread = f"{len(timed)} compared, the slowest {milliseconds(timed[-1][0])}"
            body.append([_shape(shape, mark), f"scan, {kernel}", milliseconds(timed[0][0]), f"launch {plan}; {spread}"])
        for shape, kernels in results.get("kernels", {}).items():
            for name, us in kernels.items():
                body.append(
                    [_shape(shape, mark), _short(name), f"{fixed(us, ',.1f')} µs", "in one forward and backward pass"]
                )
        for shape, ops in results.get("others", {}).items():
            body += [[_shape(shape, mark), _short(name), milliseconds(ms), "the op alone"] for name, ms in ops.items()]
    columns = ("Shape", "Kernel", "#Time", "What")
    return make_table("gpu-launches", columns, body, title="Launches and kernels", about=_LAUNCHES)


def is_processes_case(row: dict[str, Any]) -> bool:
    """Return whether a row is a comparison of ``two_gpus.py``."""
    return {"what", "kind", "processes", "peak_gib"} <= row.keys()


def processes_table(sources: Sequence[Source]) -> Table:
    """What ``two_gpus.py`` compared: one row a run, each beside the one of one GPU."""
    body: list[list[Cell | str]] = []
    for source in sources:
        for row in filter(is_processes_case, source.record.results.get("rows", [])):
            way = {"one": "one GPU", "whole": "DDP", "shared": "FSDP2"}
            kind = " then ".join(way.get(part, part) for part in row["kind"].split(" then "))
            alone = row["kind"] == "one"
            body.append([
                Cell(row["what"], source.mark), kind, f"{row['processes']:,}",
                *("–" if alone else fixed(row[part], ".1e") for part in ("loss", "weight")),
                size(row["peak_gib"] * 2**30),
                "–" if alone else Cell("yes" if row["right"] else "no", style="" if row["right"] else "error"),
            ])  # fmt: skip
    columns = ("Run", "Way", "#Processes at the end", "#Loss, part", "#Weights, part of a rate's steps",
               "#Peak memory", "Passed")  # fmt: skip
    return make_table("two-gpus", columns, body, title="One GPU and two", about=_PROCESSES)


def _cases(sources: Sequence[Source], kind: str) -> list[tuple[Source, str, list[int], Any]]:
    return [(s, model, sizes, got) for s in sources for name, model, sizes, got in decode_cases(s) if name == kind]


def _shape(shape: Any, mark: str) -> Cell:
    parts = shape.strip("()").split(", ") if isinstance(shape, str) else shape
    return Cell(" × ".join(f"{int(part):,}" for part in parts), mark, "shape")


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
