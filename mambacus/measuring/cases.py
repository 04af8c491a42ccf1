"""What `mambacus bench` measures: one `Case` is one implementation at one shape, run in a process of its own.

A process per case keeps peak memory honest and lets two implementations alternate on a machine whose speed drifts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from mambacus.runtime.errors import UserError

IMPLEMENTATIONS = ("mambacus", "transformers")
BENCHMARKS = ("prefill", "decode", "train")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        benchmark: ``prefill`` (one pass over ``seqlen`` tokens, logits of every token), ``decode`` (``new_tokens``
            greedy one-token steps after a prompt of ``seqlen``; the prompt is not counted) or ``train`` (forward and
            backward, no optimiser step).
        implementation: ``mambacus``, or ``transformers`` (MambaForCausalLM without optional kernel packages).
        model: a published shape such as ``130m``; the weights are random.
        dtype: of weights and activations; ``mixed``: float32 weights, products in bfloat16 (autocast).
        batch: rows.
        seqlen: tokens a row.
        new_tokens: one-token steps (``decode`` only).
        repeats: counted runs.
        warmup: uncounted runs before them.
        threads: CPU threads; 0 leaves torch's default.
        device: torch device string.
        graph: replay the step as a CUDA graph (``train`` by ``mambacus`` on a GPU only).
    """

    benchmark: str
    implementation: str
    model: str
    dtype: str
    batch: int
    seqlen: int
    new_tokens: int = 0
    repeats: int = 3
    warmup: int = 1
    threads: int = 0
    device: str = "cpu"
    graph: bool = False

    @property
    def tokens(self) -> int:
        """Tokens processed by one counted run."""
        return self.batch * (self.new_tokens if self.benchmark == "decode" else self.seqlen)

    @property
    def title(self) -> str:
        """A short name for progress lines."""
        shape = f"{self.batch} x {self.seqlen}" + (f" + {self.new_tokens}" if self.new_tokens else "")
        return f"{self.benchmark} {self.model} {self.dtype} {shape} {self.implementation}"


def measure(case: Case, timeout_seconds: float) -> dict[str, Any]:
    """Run ``case`` in a fresh process.

    Returns:
        The case's fields with ``samples_ms``, ``median_ms``, ``tokens_per_second``, ``peak_memory_bytes`` and
        ``weights_memory_bytes`` (peak before the first step); or, if it ran out of memory or time, ``error`` with the
        reason.

    Raises:
        UserError: the process failed for another reason; the message ends with its last line.
    """
    row: dict[str, Any] = dataclasses.asdict(case)
    command = [sys.executable, "-m", "mambacus.measuring.worker", json.dumps(row)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(case.threads)} if case.threads else {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"not finished after {timeout_seconds:.0f} s"}
    last_line = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return row | json.loads(last_line)
    if done.returncode == -9 or "out of memory" in done.stderr.lower():
        return row | {"error": "out of memory"}
    last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"{case.title}: {last_line.removeprefix(f'{UserError.__module__}.UserError: ')}")
