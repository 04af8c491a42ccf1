"""``mambacus bench train|decode|prefill|lengths|scan|eval``: speed and memory side by side with peers, in one record.

Every case runs in a process of its own, implementations alternate, and the record keeps every sample and the machine's
ceilings measured in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.bench_plan import WHAT, fill, idle, plan, told
from mambacus.measuring.cases import DTYPES, IMPLEMENTATIONS, LOGITS, METHODS
from mambacus.measuring.shapes import MATCHED
from mambacus.runtime.config import check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record

if TYPE_CHECKING:
    import torch

    from mambacus.measuring.cases import Case
    from mambacus.measuring.journal import RowJournal

SIZES = tuple(MATCHED)
MODES = ("eager", "graph")
CPU_SHAPES = ((1, 1536, 1024), (1, 1536, 4096), (4, 1536, 512))  # of the scan alone: batch, d_inner, seqlen


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus bench``; what is left open is decided by the kind and the device (docs/benchmarks.md)."""

    what: str = opt(
        help="train (forward and backward) | decode (prompts, one-token steps, both) | prefill | "
        "lengths (all three over sequence length, with cross-overs) | scan (that op alone) | "
        "eval (with states reused, without, and by lm_eval's hf model; on a GPU beside a Transformer); "
        "generation, of a named model, has flags of its own: mambacus bench generation --help",
        choices=tuple(WHAT),
        positional=True,
    )
    out: Path = opt(help="the JSON record to write", metavar="FILE.json")
    model: str | None = opt(
        None, f"published Mamba shape with random weights, for eval tiny itself ({told('model')})", choices=SIZES
    )
    implementations: tuple[str, ...] = opt(
        (),
        "who is measured: mambacus, transformers (its Mamba), llama.cpp (its Mamba), or Transformers by their shape, "
        "such as pythia-160m (default: mambacus,transformers; lengths: mambacus and the Transformer of its size)",
        choices=IMPLEMENTATIONS,
        metavar="NAME,...",
    )
    dtypes: tuple[str, ...] = opt(
        (),
        "float32, bfloat16, float16, mixed (for train: float32 weights, bfloat16 autocast), int8, int4 "
        f"({told('dtypes')})",
        choices=DTYPES,
    )
    batches: tuple[int, ...] = opt((1,), "rows", least=1)
    seqlens: tuple[int, ...] = opt((), f"tokens a row for prefill, train and lengths ({told('seqlens')})", least=1)
    prompts: tuple[int, ...] = opt((16,), "for decode: prompt tokens a row", least=1)
    new_tokens: tuple[int, ...] = opt((), f"for decode and lengths: one-token steps ({told('new_tokens')})", least=1)
    samples: int = opt(0, "for decode: also time so many completions of one prompt", least=0)
    method: str = opt("full", "for train: the whole model, or lora of rank 16", choices=METHODS)
    logits: str = opt("last", "for prefill: logits of the last token, as generation needs, or of all", choices=LOGITS)
    modes: tuple[str, ...] = opt(
        (),
        f"on a GPU: eager, graph (ours: CUDA graphs; transformers: torch.compile, static cache) ({told('modes')})",
        choices=MODES,
    )
    repeats: int = opt(3, "counted runs of each case", least=1)
    warmup: int = opt(1, "uncounted runs before them", least=0)
    peer_repeats: int = opt(
        0, "counted runs for peers when they are slow (0: as --repeats); with 1 they get no warm-up", least=0
    )
    peer_dtypes: tuple[str, ...] = opt(
        (), "dtypes for peers (default: as --dtypes); as many as --dtypes are measured in turn, pair by pair",
        choices=DTYPES,
    )  # fmt: skip
    threads: int = opt(0, "CPU threads (0: torch's default)", least=0)
    device: str = opt("cpu", "cpu or cuda")
    timeout: float = opt(1800.0, "seconds after which a case is given up and recorded so", above=0)
    shapes: tuple[str, ...] = opt((), "for scan: batch x d_inner x seqlen, such as 8x1536x2048 (default: by device)")
    documents: int = opt(100, "for eval: documents of each task", least=1)
    peer_documents: int = opt(5, "for eval on a CPU: documents for lm_eval's hf model, which is slow", least=1)
    tuned: Path | None = opt(
        None, "for eval on a CPU: gsm8k also by this model, such as tiny tuned and merged, which ends its answers",
        metavar="DIR",
    )  # fmt: skip
    data_dir: Path | None = opt(None, "for eval: folder of the evaluation files", metavar="DIR")
    label: str = opt("", "name of the machine or change, for reports")
    resume: bool = opt(False, "go on with the rows of a run that was stopped")
    overwrite: bool = opt(False, "replace an existing record")


def run(config: Config) -> Record:
    """Measure every case of `plan` and write the record.

    ``results``: ``rows`` (the fields of a case, the figures of `mambacus.measuring.worker.measure`, ``least_ms`` and
    ``of_least``; or ``error``), ``ceilings`` of this machine, and for ``lengths`` ``crossovers``. Finished rows lie in
    ``<record>.rows.jsonl`` until the record is written.

    Raises:
        UserError: a setting out of range or of another kind of benchmark, an existing record, a package that is not
            there, or a case that failed for another reason than memory or time.
    """
    from mambacus.measuring.crossovers import crossovers
    from mambacus.measuring.journal import RowJournal, journal_path
    from mambacus.measuring.sides import require
    from mambacus.measuring.timing import ceilings
    from mambacus.ops.dispatch import which_kernels
    from mambacus.runtime.device import resolve_device

    watch = Stopwatch()
    check(config)
    if faults := idle(config):
        raise UserError("; ".join(faults))
    claim_file(config.out, overwrite=config.overwrite)
    device = resolve_device(config.device)
    given, config = config, fill(config)  # the record keeps what was asked for, so that a study finds it again
    alone = {"scan": _scan, "eval": _eval}.get(config.what)
    if alone is not None:
        results = alone(config, device)
    else:
        require(config.implementations)
        journal = RowJournal(journal_path(config.out), resume=config.resume, overwrite=config.overwrite)
        limits = ceilings(device)
        results = {"rows": _measure_all(list(plan(config)), config.timeout, journal, limits), "ceilings": limits}
        if config.what == "lengths":
            results["crossovers"] = crossovers(results["rows"])
    results["ran_on"] = which_kernels(device)
    label = config.label or ("selective_scan" if config.what == "scan" else config.model or "")
    record = watch.record("bench", label, given, results)
    write_record(config.out, record)
    if alone is None:
        journal.remove()
    return record


def _measure_all(
    cases: Sequence[Case], timeout: float, journal: RowJournal, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the row of every case, measured or from the journal, showing each as it comes."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from mambacus.measuring.costs import with_limits
    from mambacus.measuring.kept import Measurer

    rows = []
    console = Console(stderr=True)
    with (
        Measurer() as measurer,
        Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("bench", total=len(cases))
        for case in cases:
            progress.update(task, description=case.title)
            row = journal.find(case)
            if row is None:
                row = with_limits(measurer.measure(case, timeout), limits)
                journal.add(case, row)
            rows.append(row)
            progress.console.print(_line(case, row), highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)
    return rows


def _scan(config: Config, device: torch.device) -> dict[str, Any]:
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
    return {"rows": rows, "ceilings": limits}


def _eval(config: Config, device: torch.device) -> dict[str, Any]:
    from mambacus.measuring.evaluation import eval_cases, measure_evaluation, summary
    from mambacus.measuring.timing import ceilings

    if config.data_dir is None or not config.data_dir.is_dir():
        raise UserError(f"--data-dir: expected the folder of the evaluation files, got {config.data_dir}")
    if config.tuned is not None and not config.tuned.is_dir():
        raise UserError(f"--tuned: expected a model folder, got {config.tuned}")
    dtype, counts = config.dtypes[0], (config.documents, config.peer_documents)
    cases = eval_cases(config.model or "", str(device), dtype, *counts, config.threads, config.tuned)
    rows = []
    for _, row in measure_evaluation(cases, config.data_dir, config.timeout):
        rows.append(row)
        print(summary(row), flush=True)
    return {"rows": rows, "ceilings": ceilings(device)}


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


def _line(case: Case, row: dict[str, Any]) -> str:
    """Return one row for a terminal."""
    figures = row.get("error")
    if not figures:
        gib = row["peak_memory_bytes"] / 2**30
        figures = f"{row['tokens_per_second']:10.1f} tok/s  {row['median_ms']:10.1f} ms  {gib:6.2f} GiB"
    mode = f"{case.method if case.method != 'full' else ''} {'graph' if case.graph else ''}".strip()
    return f"{case.benchmark:8} {case.dtype:9} {case.shape:16} {mode:6} {case.implementation:13} {figures}"


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print one row per case; ``generation`` takes flags of its own."""
    if argv[:1] == ["generation"]:
        from mambacus.bench_generation import main as generation

        generation(argv[1:])
        return
    from mambacus.measuring.cases import Case

    config = parse(Config, argv, "mambacus bench", __doc__.splitlines()[0])
    record = run(config)
    if config.what == "eval":  # its rows were printed as they came
        print(f"record: {config.out}")
        return
    if config.what == "scan":
        _print_scan(record.results["rows"])
        print(f"record: {config.out}")
        return
    fields = [field.name for field in dataclasses.fields(Case)]
    for row in record.results["rows"]:
        print(_line(Case(**{name: row[name] for name in fields}), row))
    for entry in record.results.get("crossovers", ()):
        where = "no cross-over" if entry["seqlen"] is None else f"cross-over at {entry['seqlen']:,.0f} tokens"
        steps = f" + {entry['new_tokens']}" if entry["new_tokens"] else ""
        print(
            f"{entry['benchmark']:8} {entry['dtype']:9} batch {entry['batch']}{steps}: {entry['metric']}: {where}: "
            f"{entry['note']}"
        )
    print(f"record: {config.out}")
