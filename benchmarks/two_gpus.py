"""Check on two GPUs that two processes train as one: each holding the whole model (DDP), and sharing it out (FSDP2).

Run from the repository: ``PYTHONPATH=. python benchmarks/two_gpus.py --out benchmarks``. Trains a random model of half
the 130m shape with LoRA, in full and with an affix, in float32 and in bfloat16, on one GPU and on two over NCCL; lets
one GPU go on from what two had shared out, and two from one; compares losses and saved weights. The runs go at the same
time, so no speed is told. Prints one line a comparison with the peak memory of the first process, writes one JSON
record, and ends with an error if a comparison failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mambacus.models import save
from mambacus.models.registry import load_config, random_model
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.records import Stopwatch, read_record, write_record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tuning"))
from launched_runs import launch

STEPS = 6
RUNS: dict[str, dict[str, Any]] = {
    "lora float32": {"method": "lora", "dropout": 0.0, "dtype": "float32"},
    "lora bfloat16": {"method": "lora", "dropout": 0.0, "dtype": "bfloat16"},
    "full float32": {"method": "full", "dtype": "float32", "grad_accum": 2},
    "full bfloat16": {"method": "full", "dtype": "bfloat16", "checkpointing": True},
    "affix float32": {"method": "affix", "dtype": "float32"},
}
RESUMED = ("lora float32", "full float32")
MOST = {"float32": (1e-4, 0.05), "bfloat16": (2e-2, 0.5)}  # of a loss, and of weights as `compare` measures them


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the saved tensors of a run."""
    adapter = run / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run / "model" / "model.safetensors")


def compare(what: str, kind: str, one: Path, other: Path) -> dict[str, Any]:
    """Return how far two runs are apart: losses, and weights as a share of how far training can have moved them."""
    records = [read_record(run / "record.json").results for run in (one, other)]
    losses = [[entry["loss"] for entry in record["history"]] for record in records]
    loss = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    first, second = weights(one), weights(other)
    moved = STEPS * records[0]["learning_rate"]  # Adam moves a number by at most its rate a step
    weight = max(float((first[name] - second[name]).float().pow(2).mean().sqrt()) for name in first) / moved
    most_loss, most_weight = MOST[what.partition(" ")[2]]
    return {
        "what": what, "kind": kind, "loss": loss, "weight": weight,
        "right": loss <= most_loss and weight <= most_weight,
        "processes": records[1]["processes"], "sharded": records[1]["sharded"],
        "peak_gib": round(records[1]["train"]["peak_memory_bytes"] / 2**30, 3),
    }  # fmt: skip


def prepare(folder: Path) -> dict[str, Any]:
    """Write a random model with a tokenizer of bytes, and data; return the settings of a run on them."""
    config = dataclasses.replace(load_config("random:130m"), n_layer=12)
    save(random_model(config), folder / "base", byte_tokenizer())
    lines = [
        {"question": f"{a} + {b}?", "answer": str(a + b), "solution": "step by step " * (a % 40 + 1)}
        for a in range(80) for b in (3, 14)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": str(folder / "base"), "data": str(folder / "rows.jsonl"), "max_steps": STEPS, "batch_size": 16,
        "device": "cuda", "save_every": STEPS // 2, "check": 0,
    }  # fmt: skip


def cut_short(run: Path, copy: Path) -> None:
    """Copy a run as a kill in its second half would have left it."""
    shutil.copytree(run, copy)
    for name in ("adapter", "model", f"checkpoints/checkpoint-{STEPS}"):
        shutil.rmtree(copy / name, ignore_errors=True)
    (copy / "record.json").unlink()


def main() -> None:
    """Run, compare, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    options = parser.parse_args()
    watch, rows = Stopwatch(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = prepare(folder)

        def make(kind: str, count: int, sharded: bool, names: Iterable[str], **more: Any) -> None:
            jobs = [settings | RUNS[name] | {"out": str(folder / kind / name)} | more for name in names]
            launch(count, jobs, sharded=sharded, gpus=True)
            print(f"{kind}: done after {watch.seconds:.0f} s", flush=True)
            for error in sorted((folder / kind).glob("*.error*")):
                print(f"{kind}: {error.name}: {error.read_text()}", flush=True)

        with ThreadPoolExecutor() as pool:
            kinds = [("one", 1, False), ("whole", 2, False), ("shared", 2, True)]
            for waited in [pool.submit(make, *kind, RUNS) for kind in kinds]:
                waited.result()
            for kind, start in (("shared then one", "shared"), ("one then shared", "one")):
                for name in RESUMED:
                    cut_short(folder / start / name, folder / kind / name)
            later = [("shared then one", 1, False), ("one then shared", 2, True)]
            for waited in [pool.submit(make, *kind, RESUMED, resume=True) for kind in later]:
                waited.result()
        for name in RUNS:
            others = [kind for kind, _, _ in (*kinds, *later) if (folder / kind / name).is_dir()]
            rows += [compare(name, kind, folder / "one" / name, folder / kind / name) for kind in others]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"two-gpus-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{device}.json"
    write_record(path, watch.record("bench", "one and two GPUs", vars(options), {"rows": rows}))
    if not all(row["right"] for row in rows):
        raise SystemExit("two GPUs do not train as one")


if __name__ == "__main__":
    main()
