"""Products of few rows on a CPU: checks every kernel against float64, then times it beside copying memory.

Each kernel multiplies as many matrices of one shape as make 96 MiB in bfloat16, more than a cache holds, in one tape.
The kernels take turns. Prints a table and writes one JSON record.

    python benchmarks/cpu_linear.py --threads 2 --out linear.json
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.bfloat16_simd import multiplies_pairs
from mambacus.ops.linear.cpu import few_rows
from mambacus.ops.quantised_linear import pack
from mambacus.ops.quantised_linear.cpu import few_rows as quantised_few_rows
from mambacus.ops.tape import Tape
from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Stopwatch, write_record

SHAPES = {"in_proj": (3072, 768), "out_proj": (768, 1536), "head": (50280, 768)}  # of the 130m shape
MOVED = 96 << 20  # bytes of bfloat16 weights, and of memory that is copied
ALLOWED = {"float32": 1e-6, "bfloat16": 4e-3, "pairs": 4e-3, "int8": 1.2e-2, "int4": 0.12}  # relative error, rounding
Product = Callable[[Tensor, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the measurement."""

    out: Path = opt(help="record to write", metavar="FILE.json")
    threads: int = opt(2, "threads of the kernels", least=1)
    seconds: float = opt(2.0, "seconds for each shape and number of rows", above=0)
    overwrite: bool = opt(False, "replace an existing record")


def by_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product by the kernel for the processor's bfloat16 products."""
    return few_rows(x, weight, x.dtype, pairs=True)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product by the kernel that multiplies in float32."""
    return few_rows(x, weight, x.dtype, pairs=False)


def cases(shape: tuple[int, int]) -> dict[str, tuple[Product, torch.dtype, list[Any]]]:
    """Return each kernel, the dtype of its inputs and its matrices."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, MOVED // (2 * shape[0] * shape[1]))
    weights = [torch.randn(shape, generator=generator) for _ in range(count)]
    halves = [weight.bfloat16() for weight in weights]
    found: dict[str, tuple[Product, torch.dtype, list[Any]]] = {
        "float32": (widened, torch.float32, weights),
        "bfloat16": (widened, torch.bfloat16, halves),
        "pairs": (by_pairs, torch.bfloat16, halves),
        "int8": (quantised_few_rows, torch.float32, [pack(weight, "int8") for weight in weights]),
        "int4": (quantised_few_rows, torch.float32, [pack(weight, "int4") for weight in weights]),
    }
    if not multiplies_pairs():
        del found["pairs"]
    return found


def check(name: str, kernel: Product, x: Tensor, weight: Any, original: Tensor) -> None:
    """Stop if the product is further from float64's than its weights and its result are rounded."""
    truth = x.double() @ original.to(x.dtype).double().T
    error = float((kernel(x, weight).double() - truth).norm() / truth.norm())
    if not error <= ALLOWED[name]:
        raise SystemExit(f"{name}, {len(x)} rows, {tuple(original.shape)}: error {error:.2e}, allowed {ALLOWED[name]}")


def record(kernel: Product, x: Tensor, matrices: list[Any]) -> Callable[[], object]:
    """Return what multiplies ``x`` with all matrices in one tape."""
    return Tape.record(lambda: [kernel(x, matrix) for matrix in matrices])[0].replay


def alternate(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the sorted times of every function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in times.items()}


@torch.no_grad()
def measure(config: Config) -> list[dict[str, Any]]:
    """Return a row for each shape, number of rows and kernel, printing it."""
    torch.set_num_threads(config.threads)
    source, target = torch.ones(MOVED // 4), torch.empty(MOVED // 4)
    found = []
    for name, shape in SHAPES.items():
        made = cases(shape)
        sizes = {kernel: sum(m.nbytes for m in matrices) for kernel, (_, _, matrices) in made.items()}
        sizes["copy"] = 2 * MOVED
        for rows in (1, 2, 4, 8, 16):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
            runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
            for kernel, (product, dtype, matrices) in made.items():
                check(kernel, product, x.to(dtype), matrices[0], made["float32"][2][0])
                runs[kernel] = record(product, x.to(dtype), matrices)
            for kernel, times in alternate(runs, config.seconds).items():
                median, best = statistics.median(times), times[0]
                row = {"matrix": name, "rows": rows, "kernel": kernel, "bytes": sizes[kernel], "runs": len(times)}
                found.append(row | {"median_seconds": median, "best_seconds": best})
                speed = f"{sizes[kernel] / median / 1e9:6.1f} GB/s, best {sizes[kernel] / best / 1e9:6.1f}"
                print(f"{name:<9} {rows:>3} {kernel:<9} {1e3 * median:8.2f} ms {speed}", flush=True)
    return found


def main() -> None:
    """Check, time, print, write the record."""
    config = parse(Config, sys.argv[1:], "cpu_linear", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    results = {"multiplies_pairs": multiplies_pairs(), "rows": measure(config)}
    write_record(config.out, watch.record("cpu-linear", "products of few rows", config, results))


if __name__ == "__main__":
    main()
