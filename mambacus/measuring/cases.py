"""What `mambacus bench` measures: one `Case` is one implementation at one shape, run in another process.

On a CPU a process per case keeps peak memory honest and lets two implementations alternate on a machine whose speed
drifts. A GPU's allocator counts for itself: there one process measures case after case (`mambacus.measuring.kept`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from mambacus.measuring.shapes import SHAPES
from mambacus.runtime.errors import UserError

PEERS = ("transformers", "llama.cpp", *SHAPES)
IMPLEMENTATIONS = ("mambacus", *PEERS)
BENCHMARKS = ("prefill", "decode", "generate", "samples", "train")
METHODS = ("full", "lora")
LOGITS = ("last", "all")
DTYPES = ("float32", "bfloat16", "float16", "mixed", "int8", "int4")
_TORCH_DTYPES = ("float32", "bfloat16", "float16", "mixed")
QUANTISED = ("int8", "int4")
DTYPES_OF = {
    "mambacus": (*_TORCH_DTYPES, *QUANTISED),
    "llama.cpp": ("float32", "bfloat16", "float16", *QUANTISED),
}
_MEMORY_FAULTS = ("out of memory", "allocate memory", "std::bad_alloc", "memoryerror")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        benchmark: ``prefill`` (one pass over ``seqlen`` tokens), ``decode`` (``new_tokens`` greedy one-token steps
            after ``seqlen`` tokens, which are not counted), ``generate`` (both, from prompt to last token),
            ``samples`` (``samples`` completions of one prompt) or ``train`` (forward and backward, no optimiser step).
        implementation: ``mambacus``; ``transformers`` (its Mamba, without optional kernel packages); ``llama.cpp`` (its
            Mamba); or one of `SHAPES`, a Transformer through transformers.
        model: size of the Mamba, also of the one that a Transformer is set beside; the weights are random.
        dtype: of weights and activations; ``mixed``: of ``train``, float32 weights and products in bfloat16
            (autocast); ``int8`` and ``int4``: weights only.
        batch: rows.
        seqlen: tokens a row: read, trained, or in the context before decoding.
        new_tokens: one-token steps.
        repeats: counted runs.
        warmup: uncounted runs before them.
        threads: CPU threads; 0 leaves torch's default.
        device: torch device string.
        graph: replay a CUDA graph (ours) or compile (transformers).
        method: of ``train``: ``full``, or ``lora`` of rank 16.
        logits: of ``prefill``: of the ``last`` token, as generation needs, or of ``all``.
        samples: of ``samples``: completions.
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
    method: str = "full"
    logits: str = "last"
    samples: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one counted run: read and trained ones, or generated ones."""
        if self.benchmark in ("prefill", "train"):
            return self.batch * self.seqlen
        return (self.samples or self.batch) * self.new_tokens

    @property
    def title(self) -> str:
        """A short name for progress lines and errors."""
        how = [part for part, wanted in ((self.method, self.method != "full"), ("graph", self.graph)) if wanted]
        return " ".join([self.benchmark, self.model, self.dtype, self.shape, *how, self.implementation])

    @property
    def shape(self) -> str:
        """Rows, tokens and new tokens in a few letters."""
        rows = f"1 -> {self.samples}" if self.samples else str(self.batch)
        return f"{rows} x {self.seqlen}" + (f" + {self.new_tokens}" if self.new_tokens else "")

    def unavailable(self) -> str | None:
        """Return why this combination is not measured, None if it is."""
        dtypes = DTYPES_OF.get(self.implementation, _TORCH_DTYPES)
        if self.dtype not in dtypes:
            return f"{self.implementation} is not measured in {self.dtype}, only in {', '.join(dtypes)}"
        if self.dtype == "mixed" and self.benchmark != "train":
            return "mixed is training under autocast; without it these weights compute in float32: measure that"
        if self.dtype in QUANTISED and (self.benchmark == "train" or self.device != "cpu"):
            return f"{self.dtype} weights are for inference on a CPU"
        if self.implementation == "llama.cpp":
            if self.benchmark not in ("prefill", "decode", "generate") or self.logits == "all":
                return f"llama.cpp is measured at prefill (last logits), decode and generate, not at {self.benchmark}"
            if self.device != "cpu":
                return "llama.cpp is measured on the CPU only"
        if self.graph and self.implementation == "transformers" and self.benchmark in ("prefill", "train"):
            return "transformers' Mamba loops over time in Python, which is not compiled"
        if self.graph and self.implementation.startswith("gpt-neo"):
            return "transformers does not compile GPT-Neo"
        return None


def measure(case: Case, timeout_seconds: float) -> dict[str, Any]:
    """Run ``case`` in a process of its own.

    Returns:
        The case's fields with the figures of `mambacus.measuring.worker.measure`; or, if it is not available, or ran
        out of memory or time, ``error`` with the reason.

    Raises:
        UserError: the process failed for another reason; the message ends with its last line.
    """
    row: dict[str, Any] = dataclasses.asdict(case)
    if reason := case.unavailable():
        return row | {"error": reason}
    command = [sys.executable, "-m", "mambacus.measuring.worker", json.dumps(row)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, env=environment(case.threads), check=False
        )
    except subprocess.TimeoutExpired:
        return row | {"error": out_of_time(timeout_seconds)}
    if done.returncode == 0:
        return row | json.loads(done.stdout.strip().splitlines()[-1])
    return row | {"error": failure(case, done.returncode, done.stderr)}


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that is to use so many CPU threads (0: torch's default)."""
    return os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def out_of_time(seconds: float) -> str:
    """Return the error of a row whose process was given up."""
    return f"not finished after {seconds:.0f} s"


def failure(case: Case, code: int, stderr: str) -> str:
    """Return why a process that was to measure ``case`` ended, where that is a result: the memory did not suffice.

    Raises:
        UserError: any other reason; the message ends with the last line of ``stderr``.
    """
    if code == -9 or any(fault in stderr.lower() for fault in _MEMORY_FAULTS):
        return "out of memory"
    last_line = (stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"{case.title}: {last_line.removeprefix(f'{UserError.__module__}.UserError: ')}")
