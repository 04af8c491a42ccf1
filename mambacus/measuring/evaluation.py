"""What `mambacus bench eval` measures: evaluation with states reused, without, and by lm_eval's ``hf`` model.

Every case is a run of ``mambacus evaluate`` in a process of its own; implementations alternate within a task. The
seconds are those that the model took to answer all requests; loading models, kernels and documents is counted apart.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.measuring.cases import environment, out_of_time
from mambacus.measuring.shapes import MATCHED, SHAPES
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_jsonl, read_record

MAX_LENGTH = 8192  # no prompt of these tasks is cut, so that all share their worked examples
SAME_NATS = 1e-2  # log-likelihoods of a document, in a metric that keeps them; all other values must be equal
GENERATION = ("gsm8k", 5)
CPU_TASKS: tuple[tuple[str, int], ...] = (
    GENERATION,
    ("arc_challenge", 25),
    ("arc_easy", 0),
    ("hellaswag", 0),
)  # with so many worked examples
GPU_TASKS: tuple[tuple[str, int], ...] = (("hellaswag", 10),)
ZERO_SHOT = 4  # times the documents, whose prompts are short
BATCH = 64  # contexts of one pass
GPU_BATCH = 512  # the same of ours on a GPU, whose passes are short; a Transformer's logits of as many do not fit
COUNTS = ("requests", "tokens_naive", "tokens_read", "generated_tokens")
Items = Mapping[Any, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class EvalCase:
    """One implementation on one task.

    Attributes:
        task: lm_eval's name.
        num_fewshot: worked examples, the same for every document.
        implementation: ``mambacus``, ``no-state-reuse`` (ours, every request whole), ``hf`` (lm_eval's model of
            transformers) or ``hf-pythia`` (the same, of a Transformer of that size).
        model: a name as ``mambacus evaluate`` takes it.
        documents: of the task, its first ones; a slow peer gets fewer.
        batch: contexts of one pass.
        dtype: of the weights.
        device: torch device string.
        threads: CPU threads; 0 leaves torch's default.
    """

    task: str
    num_fewshot: int
    implementation: str
    model: str
    documents: int
    batch: int
    dtype: str
    device: str
    threads: int = 0

    @property
    def title(self) -> str:
        """A short name for progress lines."""
        shape = f"{self.num_fewshot}-shot {self.documents} documents"
        return f"eval {self.task} {shape} {self.implementation} {Path(self.model).name}"


def eval_cases(
    size: str,
    device: str,
    dtype: str,
    documents: int,
    peer_documents: int,
    threads: int = 0,
    tuned: Path | None = None,
) -> list[EvalCase]:
    """Return the cases of a device: on a CPU four tasks on Mamba alone, on a GPU hellaswag beside a Transformer.

    Args:
        size: ``tiny`` is the embedded model, any other size has random weights.
        device: torch device string.
        dtype: of the weights.
        documents: of each task; `ZERO_SHOT` times as many of one without worked examples.
        peer_documents: the same for ``hf`` on a CPU, where transformers reads Mamba token by token.
        threads: CPU threads; 0 leaves torch's default.
        tuned: folder of a model that also generates, on a CPU: one that has learned to end its answers.

    Raises:
        UserError: on a CPU another model than ``tiny``, on a GPU a size without a Transformer to compare with, or a
            tuned model.
    """
    model = size if size == "tiny" else f"random:{size}"
    if device.startswith("cuda"):
        if tuned is not None:
            raise UserError(f"--tuned {tuned}: expected with --device cpu, got {device}")
        sizes = [name for name in MATCHED if name not in ("micro", "tiny")]
        if size not in sizes:
            raise UserError(f"--model {size}: expected on a GPU one of {', '.join(sizes)}")
        tasks, peer, peer_documents = GPU_TASKS, "hf-pythia", documents
    elif size != "tiny":
        raise UserError(f"--model {size}: expected tiny, the embedded model, which transformers reads in bearable time")
    else:
        tasks, peer = CPU_TASKS, "hf"
    planned = [(task, shots, model) for task, shots in tasks]
    if tuned is not None:
        planned.insert(1, (*GENERATION, str(tuned)))
    cases = []
    for task, shots, model in planned:
        for name in ("mambacus", "no-state-reuse", peer):
            count = (peer_documents if name == peer else documents) * (1 if shots else ZERO_SHOT)
            batch = GPU_BATCH if device.startswith("cuda") and name == "mambacus" else BATCH
            cases.append(EvalCase(task, shots, name, model, count, batch, dtype, device, threads))
    return cases


def measure_evaluation(
    cases: Sequence[EvalCase], data_dir: Path, timeout_seconds: float
) -> Iterator[tuple[EvalCase, dict[str, Any]]]:
    """Run the cases and yield each with its row.

    Args:
        cases: ours first within a task and model: the others are compared with it. On a GPU it runs once before,
            uncounted, since a machine's first run compiles kernels.
        data_dir: evaluation files and tokenizer.
        timeout_seconds: after which a case is given up and recorded so.

    Yields:
        The case's fields with ``benchmark`` ("eval"), ``seconds`` of answering, ``wall_seconds`` of the whole command,
        ``documents_per_second``, ``metrics``, and from ours ``tokens_naive``, ``tokens_read`` and ``generated_tokens``;
        beside ours ``speedup`` (ours over this, documents a second), ``tokens_ratio`` (read by this over
        read by ours) and ``same_documents`` / ``compared_documents`` (values of every metric equal, of those that both
        answered). ``tokens_per_second`` counts every request whole, so that it compares like ``documents_per_second``.
        Or ``error`` with the reason.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, case in enumerate(cases):
            if case.device.startswith("cuda") and case.implementation == "mambacus":
                _run(case, data_dir, folder / f"{number}-warming.json", timeout_seconds)
            row, items = _run(case, data_dir, folder / f"{number}.json", timeout_seconds)
            if case.implementation == "mambacus":
                ours, our_items = row, items
            if "error" not in row:
                row |= _speed(row, ours)
                if row is not ours and "error" not in ours:
                    row |= _beside(row, items, ours, our_items)
            yield case, row


def _run(case: EvalCase, data_dir: Path, out: Path, timeout_seconds: float) -> tuple[dict[str, Any], Items]:
    """Return the row of a case, without speeds, and its items by document; ``out`` is a record to write."""
    row: dict[str, Any] = {"benchmark": "eval"} | dataclasses.asdict(case)
    command = [
        sys.executable, "-m", "mambacus", "evaluate", "--tasks", case.task, "--num-fewshot", str(case.num_fewshot),
        "--fewshot-sampler", "first_n", "--limit", str(case.documents), "--batch-size", str(case.batch),
        "--dtype", case.dtype, "--device", case.device, "--data-dir", str(data_dir), "--bootstrap-iters", "0",
        "--out", str(out), *_flags(case, data_dir, out.parent),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, env=environment(case.threads), check=False
        )
    except subprocess.TimeoutExpired:
        return row | {"error": out_of_time(timeout_seconds)}, {}
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == -9 or "out of memory" in done.stderr.lower():
            return row | {"error": "out of memory"}, {}
        raise UserError(f"{case.title}: {said.removeprefix('mambacus evaluate: error: ')}")
    record = read_record(out)
    figures = record.results
    row |= {
        "seconds": figures["seconds"]["answering"],
        "wall_seconds": record.seconds,
        "metrics": {name: score["value"] for name, score in figures["tasks"][case.task].items()},
    }
    counts = figures["state_reuse"]
    row |= {key: counts[key] for key in COUNTS if key in counts}
    items = {item["doc_id"]: item["metrics"] for _, item in read_jsonl(out.with_name(f"{out.stem}.items.jsonl"))}
    return row, items


def _flags(case: EvalCase, data_dir: Path, folder: Path) -> list[str]:
    """Return the flags that choose model and implementation; a Transformer is made where it is the peer."""
    if case.implementation == "hf-pythia":
        return ["--model", str(_pythia(case, data_dir, folder))]  # its positions end at 2048, lm_eval cuts there
    model = str(_drawn(case, data_dir, folder)) if case.device.startswith("cuda") else case.model
    flags = ["--model", model, "--max-length", str(MAX_LENGTH)]
    if case.implementation == "hf":
        return [*flags, "--implementation", "hf"]
    return [*flags, "--no-state-reuse"] if case.implementation == "no-state-reuse" else flags


def _tokenizer(data_dir: Path) -> Any:
    from mambacus.models.tokenizer import neox_tokenizer

    tokenizer = neox_tokenizer(data_dir, online=False)
    if tokenizer is None:
        raise UserError(f"--data-dir {data_dir}: expected tokenizer/20B_tokenizer.json, which both sides read with")
    return tokenizer


def _drawn(case: EvalCase, data_dir: Path, folder: Path) -> Path:
    """Write our model with random weights drawn on the GPU and the tokenizer, once, and return its folder."""
    from mambacus.models import load_config, save
    from mambacus.models.registry import random_model
    from mambacus.runtime.device import resolve_device, resolve_dtype

    place = folder / case.model.removeprefix("random:")
    if not place.is_dir():
        model = random_model(load_config(case.model), device=resolve_device(case.device))
        save(model.to(resolve_dtype(case.dtype)), place, _tokenizer(data_dir))
    return place


def _pythia(case: EvalCase, data_dir: Path, folder: Path) -> Path:
    """Write a GPT-NeoX model of Pythia's shape with random weights and its tokenizer, once, and return its folder."""
    import torch
    import transformers

    from mambacus.runtime.device import resolve_dtype

    size = case.model.removeprefix("random:")
    place = folder / f"pythia-{size}"
    if place.is_dir():
        return place
    tokenizer = _tokenizer(data_dir)
    config = SHAPES[MATCHED[size]].config()
    config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    with torch.device(case.device):
        peer: torch.nn.Module = transformers.GPTNeoXForCausalLM(config)
    peer.to(resolve_dtype(case.dtype)).save_pretrained(place)  # type: ignore[operator]
    tokenizer.save_pretrained(place)
    return place


def _speed(row: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the speeds, and the fields by which reports show a row beside those of other benchmarks."""
    speed = row["documents"] / row["seconds"]
    found: dict[str, Any] = {"documents_per_second": speed, "median_ms": 1e3 * row["seconds"]}
    found["samples_ms"] = [found["median_ms"]]
    if "tokens_naive" in ours:
        work = ours["tokens_naive"] + ours["generated_tokens"]
        found["tokens_per_second"] = speed * work / ours["documents"]
        found["seqlen"] = round(ours["tokens_naive"] / ours["requests"])
    return found


def _beside(row: Mapping[str, Any], items: Items, ours: Mapping[str, Any], our_items: Items) -> dict[str, Any]:
    """Return how a row compares with ours."""
    found: dict[str, Any] = {"speedup": ours["documents_per_second"] / row["documents_per_second"]}
    if row["implementation"] != "hf-pythia":  # another model has other answers
        common = items.keys() & our_items.keys()
        found["compared_documents"] = len(common)
        found["same_documents"] = sum(_same(items[key], our_items[key]) for key in common)
    if "tokens_read" in row:
        found["tokens_ratio"] = row["tokens_read"] / ours["tokens_read"]
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two documents have the same metrics; lists hold log-likelihoods."""
    return one.keys() == other.keys() and all(
        value == other[name] or (isinstance(value, list) and _close(value, other[name])) for name, value in one.items()
    )


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=0.0, abs_tol=SAME_NATS) for a, b in zip(one, other, strict=True))


def summary(row: Mapping[str, Any]) -> str:
    """Return one line for a row."""
    shape = f"{row['num_fewshot']:>2}-shot {row['documents']:>4} documents"
    head = f"eval {row['task']:<14} {shape} {row['implementation']:<15} {Path(row['model']).name:<10}"
    if row.get("error"):
        return f"{head} {row['error']}"
    parts = [f"{row['seconds']:8.1f} s {row['documents_per_second']:8.2f} documents/s"]
    if "tokens_read" in row:
        parts.append(f"{row['tokens_read']:>9,} tokens read, {row['generated_tokens']:,} generated")
    if "speedup" in row:
        parts.append(f"ours {row['speedup']:.1f} x as fast")
    if "tokens_ratio" in row:
        parts.append(f"{row['tokens_ratio']:.1f} x fewer tokens read")
    if "compared_documents" in row:
        parts.append(f"{row['same_documents']} of {row['compared_documents']} documents the same")
    return f"{head} {', '.join(parts)}"
