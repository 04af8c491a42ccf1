"""``mambacus bench train|decode|scan|eval``: speed and memory side by side with peers, into one JSON record.

Every case runs in a process of its own, implementations alternate, and the record keeps every sample and the machine's
ceilings measured in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record

if TYPE_CHECKING:
    import torch

    from mambacus.measuring.cases import Case

WHAT: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "decode": ("prefill", "decode"),
    "prefill": ("prefill",),
    "scan": (),
    "eval": (),
}
SIZES = ("micro", "tiny", "130m", "370m", "790m", "1.4b", "2.8b")
DTYPES = ("float32", "bfloat16", "float16", "mixed")
CPU_SHAPES = ((1, 1536, 1024), (1, 1536, 4096), (4, 1536, 512))  # of the scan alone: batch, d_inner, seqlen


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus bench``."""

    what: str = opt(
        help="train (forward and backward) | decode (prefill and one-token steps) | prefill | scan (that op alone) | "
        "eval (with states reused, without, and by lm_eval's hf model; on a GPU beside a Transformer)",
        choices=tuple(WHAT),
        positional=True,
    )
    out: Path = opt(help="the JSON record to write", metavar="FILE.json")
    model: str = opt("130m", "published shape with random weights", choices=SIZES)
    implementations: tuple[str, ...] = opt(
        ("mambacus", "transformers"), "who is measured", choices=("mambacus", "transformers")
    )
    dtypes: tuple[str, ...] = opt(
        ("float32",), "float32, bfloat16, float16, mixed (float32 weights, bfloat16 autocast)", choices=DTYPES
    )
    batches: tuple[int, ...] = opt((1,), "rows", least=1)
    seqlen: int = opt(1024, "tokens a row for prefill and train", least=1)
    prompt: int = opt(16, "prompt tokens before decoding", least=1)
    new_tokens: int = opt(32, "one-token steps in decoding", least=1)
    repeats: int = opt(3, "counted runs of each case", least=1)
    warmup: int = opt(1, "uncounted runs before them", least=0)
    peer_repeats: int = opt(
        0, "counted runs for peers when they are slow (0: as --repeats); with 1 they get no warm-up", least=0
    )
    peer_dtypes: tuple[str, ...] = opt((), "dtypes for peers (default: as --dtypes)", choices=DTYPES)
    threads: int = opt(0, "CPU threads (0: torch's default)", least=0)
    device: str = opt("cpu", "cpu or cuda")
    graph: bool = opt(False, "train: replay our step as a CUDA graph")
    timeout: float = opt(1800.0, "seconds after which a case is given up and recorded so", above=0)
    shapes: tuple[str, ...] = opt((), "for scan: batch x d_inner x seqlen, such as 8x1536x2048 (default: by device)")
    documents: int = opt(100, "for eval: documents of each task", least=1)
    peer_documents: int = opt(5, "for eval on a CPU: documents for lm_eval's hf model, which is slow", least=1)
    data_dir: Path | None = opt(None, "for eval: folder of the evaluation files", metavar="DIR")
    label: str = opt("", "name of the machine or change, for reports")
    overwrite: bool = opt(False, "replace an existing record")


def plan(config: Config) -> Iterator[Case]:
    """Yield the cases in the order they run: implementations alternate within a shape."""
    from mambacus.measuring.cases import Case

    check(config)
    dtypes = [*config.dtypes, *(name for name in config.peer_dtypes if name not in config.dtypes)]
    for benchmark in WHAT[config.what]:
        for dtype in dtypes:
            for batch in config.batches:
                for name in config.implementations:
                    ours = name == "mambacus"
                    if dtype not in (config.dtypes if ours else config.peer_dtypes or config.dtypes):
                        continue
                    repeats = config.repeats if ours or not config.peer_repeats else config.peer_repeats
                    yield Case(
                        benchmark, name, config.model, dtype, batch,
                        seqlen=config.prompt if benchmark == "decode" else config.seqlen,
                        new_tokens=config.new_tokens if benchmark == "decode" else 0,
                        repeats=repeats, warmup=0 if repeats == 1 and not ours else config.warmup,
                        threads=config.threads, device=config.device,
                        graph=config.graph and ours and benchmark == "train",
                    )  # fmt: skip


def run(config: Config) -> Record:
    """Measure every case of `plan` and write the record.

    Raises:
        UserError: a setting out of range, an existing record, or a case that failed for another reason than memory or
            time.
    """
    from rich.console import Console
    from rich.progress import Progress

    from mambacus.measuring.cases import measure
    from mambacus.measuring.timing import ceilings
    from mambacus.runtime.device import resolve_device

    watch = Stopwatch()
    check(config)
    claim_file(config.out, overwrite=config.overwrite)
    device = resolve_device(config.device)
    if config.graph and (config.what != "train" or device.type != "cuda"):
        raise UserError(f"--graph: expected with train and --device cuda, got {config.what} on {device.type}")
    if config.what == "scan":
        return _run_scan(config, watch, device)
    if config.what == "eval":
        return _run_eval(config, watch, device)
    cases = list(plan(config))
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("bench", total=len(cases))
        for case in cases:
            progress.update(task, description=case.title)
            rows.append(measure(case, config.timeout))
            progress.advance(task)
    record = watch.record("bench", config.label or config.model, config, {"rows": rows, "ceilings": ceilings(device)})
    write_record(config.out, record)
    return record


def _run_scan(config: Config, watch: Stopwatch, device: torch.device) -> Record:
    import torch

    from mambacus.measuring.scan import MAMBA_SSM_H100, exponentials_per_second, limits_ms, measure_scan
    from mambacus.measuring.timing import ceilings
    from mambacus.runtime.device import resolve_dtype

    if config.threads:
        torch.set_num_threads(config.threads)
    limits: dict[str, Any] = ceilings(device) | {"exponentials_per_s": exponentials_per_second(device)}
    default = tuple(MAMBA_SSM_H100) if device.type == "cuda" else CPU_SHAPES
    rows = []
    for shape in [_shape(text) for text in config.shapes] or default:
        for name in config.dtypes:
            dtype = resolve_dtype(name)
            rows.append(measure_scan(shape, device, dtype) | limits_ms(shape, dtype, limits))
    record = watch.record("bench", config.label or "selective_scan", config, {"rows": rows, "ceilings": limits})
    write_record(config.out, record)
    return record


def _run_eval(config: Config, watch: Stopwatch, device: torch.device) -> Record:
    from mambacus.measuring.evaluation import eval_cases, measure_evaluation, summary
    from mambacus.measuring.timing import ceilings

    if config.data_dir is None or not config.data_dir.is_dir():
        raise UserError(f"--data-dir: expected the folder of the evaluation files, got {config.data_dir}")
    dtype, counts = config.dtypes[0], (config.documents, config.peer_documents)
    cases = eval_cases(config.model, str(device), dtype, *counts, config.threads)
    rows = []
    for _, row in measure_evaluation(cases, config.data_dir, config.timeout):
        rows.append(row)
        print(summary(row), flush=True)
    record = watch.record("bench", config.label or config.model, config, {"rows": rows, "ceilings": ceilings(device)})
    write_record(config.out, record)
    return record


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shapes: expected batch x d_inner x seqlen such as 8x1536x2048, got {text!r}")
    batch, d_inner, seqlen = (int(part) for part in parts)
    return batch, d_inner, seqlen


def _print_scan(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        peer = row.get("mamba_ssm_h100_ms")
        ratios = f"  {peer[0] / row['forward_ms']:.2f}x {peer[1] / row['both_ms']:.2f}x mamba-ssm" if peer else ""
        shape = "x".join(str(size) for size in row["shape"])
        print(f"scan {row['dtype']:9} {shape:15} forward {row['forward_ms']:9.3f} ms  forward + backward "
              f"{row['both_ms']:9.3f} ms  worst error {max(row['errors'].values()):.1e}{ratios}")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print one row per case."""
    config = parse(Config, argv, "mambacus bench", __doc__.splitlines()[0])
    record = run(config)
    if config.what == "eval":  # its rows were printed as they came
        print(f"record: {config.out}")
        return
    if config.what == "scan":
        _print_scan(record.results["rows"])
        print(f"record: {config.out}")
        return
    for row in record.results["rows"]:
        shape = f"{row['batch']} x {row['seqlen']}" + (f" + {row['new_tokens']}" if row["new_tokens"] else "")
        figures = row.get("error")
        if not figures:
            gib = row["peak_memory_bytes"] / 2**30
            figures = f"{row['tokens_per_second']:10.1f} tok/s  {row['median_ms']:10.1f} ms  {gib:6.2f} GiB"
        print(f"{row['benchmark']:8} {row['dtype']:9} {shape:14} {row['implementation']:13} {figures}")
    print(f"record: {config.out}")
