"""``mambacus bench generation``: how fast a model answers math problems, with the original study's sampling settings.

The upstream Mamba benchmark script (``benchmark_generation_mamba_simple.py``) generates 100 tokens at batch 1 with
temperature 1, top-k 1, top-p 1, min-p 0 and repetition penalty 1. The study kept that and asked math problems, as here.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime.config import MOST_SEED, check, opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus bench generation``."""

    model: str = opt(help="tiny, a model folder, a hub id or random:SIZE; any Hugging Face causal LM", metavar="M")
    out: Path = opt(help="the JSON record to write", metavar="FILE.json")
    prompts: str = opt("gsm8k", "math bench of solve whose first problems are the prompts")
    limit: int = opt(8, "prompts, generated one after the other", least=1)
    new_tokens: int = opt(100, "tokens to generate; fewer where the model ends", least=1)
    temperature: float = opt(1.0, "of sampling; 0 is greedy", least=0)
    top_k: int = opt(1, "sample from the k likeliest tokens; 0: all", least=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this share of probability", above=0, most=1)
    min_p: float = opt(0.0, "draw from tokens at least this fraction as likely as the likeliest", least=0, most=1)
    repetition_penalty: float = opt(1.0, "divide the logits of seen tokens by this", above=0)
    repeats: int = opt(3, "counted passes over the prompts, after an uncounted one", least=1)
    data_dir: Path | None = opt(None, "folder of the math sets", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    seed: int = opt(0, "seed of sampling", least=0, most=MOST_SEED)
    label: str | None = opt(None, "name of the model in reports; default: from --model", metavar="NAME")
    implementation: str = opt("auto", "auto: ours for Mamba, else transformers", choices=("auto", "mambacus", "hf"))
    overwrite: bool = opt(False, "replace an existing record")


def run(config: Config) -> Record:
    """Time whole answers, prompt included, and write a ``bench`` record with one row.

    The row's ``seqlen`` and ``new_tokens`` are the mean prompt and the mean answer; ``samples_ms`` holds one time for
    each pass over the prompts, divided by their number; ``peak_memory_bytes`` is this model's, on a GPU alone.

    Raises:
        UserError: an existing output, an unknown bench or model, missing data, an unknown device or dtype.
    """
    check(config)
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    import torch

    from mambacus.evals.math import load_problems, prompt
    from mambacus.inference import SamplingParams
    from mambacus.runtime.device import peak_memory_bytes, resolve_device

    prompts = [prompt(each, "cot") for each in load_problems(config.prompts, config.data_dir, config.limit, 0)]
    device = resolve_device(config.device)
    engine, implementation = _engine(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    params = SamplingParams(
        max_new_tokens=config.new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=config.seed,
    )  # fmt: skip
    samples, generated = [], 0
    for place in range(config.repeats + 1):
        start = time.perf_counter()
        counts = [
            len(engine.generate([text], params)[0][0].token_ids) for text in prompts
        ]  # ids on the CPU: it is done
        if place:
            samples.append(1e3 * (time.perf_counter() - start) / len(prompts))
            generated += sum(counts)
    middle = statistics.median(samples)
    answer = generated / config.repeats / len(prompts)
    row = {
        "benchmark": "generation", "implementation": implementation, "model": _label(config), "dtype": config.dtype,
        "batch": 1, "seqlen": round(sum(_tokens(engine.tokenizer, text) for text in prompts) / len(prompts)),
        "new_tokens": round(answer), "repeats": config.repeats, "device": str(device),
        "samples_ms": [round(sample, 3) for sample in samples], "median_ms": round(middle, 3),
        "tokens_per_second": round(1e3 * answer / middle, 2),
        "peak_memory_bytes": peak_memory_bytes(device) if device.type == "cuda" else None,
    }  # fmt: skip
    record = watch.record("bench", _label(config), config, {"rows": [row]})
    write_record(config.out, record)
    return record


def _engine(config: Config, device: Any) -> tuple[Any, str]:
    """Return what generates one prompt at a time, and its name in the record."""
    from mambacus.evals.baselines import BaselineEngine, choose_implementation, load_baseline
    from mambacus.inference import Engine
    from mambacus.models import load
    from mambacus.runtime.device import resolve_dtype
    from mambacus.runtime.errors import UserError

    dtype = resolve_dtype(config.dtype)
    if choose_implementation(config.model, config.implementation) == "hf":
        return BaselineEngine(*load_baseline(config.model, device, dtype, None), 1), "transformers"
    model, tokenizer = load(config.model, device, dtype, data_dir=config.data_dir)
    if tokenizer is None:
        raise UserError(f"model {config.model!r}: no tokenizer; give --data-dir with tokenizer/20B_tokenizer.json")
    return Engine(model, tokenizer, batch_size=1), "mambacus"


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def _label(config: Config) -> str:
    return config.label or Path(config.model).name


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the row."""
    config = parse(Config, argv, "mambacus bench generation", __doc__.splitlines()[0])
    row = run(config).results["rows"][0]
    shape = f"{row['dtype']} {row['seqlen']} + {row['new_tokens']} tokens"
    print(f"generation {row['model']} {shape}, {row['implementation']}: "
          f"{row['tokens_per_second']:.1f} tokens/s, {row['median_ms']:.0f} ms an answer")  # fmt: skip
    print(f"record: {config.out}")
