"""Which cases ``mambacus bench`` runs, in which order: implementations alternate within a shape."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mambacus.measuring.cases import Case
from mambacus.measuring.shapes import MATCHED
from mambacus.runtime.errors import UserError

if TYPE_CHECKING:
    from mambacus.bench import Config

WHAT: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "decode": ("prefill", "decode", "generate", "samples"),
    "prefill": ("prefill",),
    "lengths": ("prefill", "decode", "train"),
    "scan": (),
    "eval": (),
}
_BY_ENGINE = ("generate", "samples")  # on a GPU our Engine always decodes with graphs


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a kind of benchmark measures on a kind of device unless it is told otherwise."""

    model: str = "130m"
    seqlens: tuple[int, ...] = (1024,)
    new_tokens: tuple[int, ...] = (32,)
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = ("eager",)


_BOTH_MODES = ("eager", "graph")
_DEFAULTS = {
    ("lengths", "cpu"): Defaults(seqlens=(128, 512, 2048, 4096), new_tokens=(16,)),
    ("lengths", "cuda"): Defaults("1.4b", (512, 2048, 8192, 32768, 65536), (64,), ("bfloat16",), _BOTH_MODES),
    ("decode", "cuda"): Defaults(dtypes=("bfloat16",), new_tokens=(128,), modes=_BOTH_MODES),
    ("prefill", "cuda"): Defaults(dtypes=("bfloat16",)),
    ("train", "cuda"): Defaults(dtypes=("mixed",)),
}


def fill(config: Config) -> Config:
    """Return ``config`` with what it leaves open decided by the kind and the device.

    Raises:
        UserError: CUDA graphs on a device that has none.
    """
    kind = "cuda" if config.device.startswith("cuda") else "cpu"
    default = _DEFAULTS.get((config.what, kind), Defaults())
    model = config.model or default.model
    peer = MATCHED[model] if config.what == "lengths" else "transformers"
    if kind == "cpu" and "graph" in config.modes:
        raise UserError(f"--modes graph: expected with --device cuda, got {config.device}")
    return dataclasses.replace(
        config,
        model=model,
        implementations=config.implementations or ("mambacus", peer),
        seqlens=config.seqlens or default.seqlens,
        new_tokens=config.new_tokens or default.new_tokens,
        dtypes=config.dtypes or default.dtypes,
        modes=config.modes or default.modes,
    )


def plan(config: Config) -> Iterator[Case]:
    """Yield the cases of a filled configuration."""
    for benchmark in WHAT[config.what]:
        if benchmark == "samples" and not config.samples:
            continue
        dtypes = [*config.dtypes, *(name for name in config.peer_dtypes if name not in config.dtypes)]
        shapes = list(_shapes(config, benchmark))
        for dtype, (batch, seqlen, new_tokens), mode in itertools.product(dtypes, shapes, config.modes):
            for name in config.implementations:
                ours = name == "mambacus"
                if dtype not in (config.dtypes if ours else config.peer_dtypes or config.dtypes):
                    continue
                by_engine = ours and benchmark in _BY_ENGINE and config.device.startswith("cuda")
                if by_engine and mode != config.modes[-1]:
                    continue
                repeats = config.repeats if ours or not config.peer_repeats else config.peer_repeats
                yield Case(
                    benchmark, name, config.model or "", _dtype(config, benchmark, dtype), batch, seqlen, new_tokens,
                    repeats=repeats, warmup=0 if repeats == 1 and not ours else config.warmup,
                    threads=config.threads, device=config.device, graph=by_engine or mode == "graph",
                    method=config.method if benchmark == "train" else "full",
                    logits=config.logits if benchmark == "prefill" else "last",
                    samples=config.samples if benchmark == "samples" else 0,
                )  # fmt: skip


def _shapes(config: Config, benchmark: str) -> Iterator[tuple[int, int, int]]:
    """Yield batch, tokens a row and new tokens of the cases of one benchmark."""
    lengths = config.prompts if config.what == "decode" else config.seqlens
    steps = (0,) if benchmark in ("prefill", "train") else config.new_tokens
    batches = (1,) if benchmark == "samples" else config.batches
    yield from itertools.product(batches, lengths, steps)


def _dtype(config: Config, benchmark: str, dtype: str) -> str:
    """Return the dtype of a case: training beside bfloat16 inference has float32 weights under autocast."""
    return "mixed" if config.what == "lengths" and benchmark == "train" and dtype == "bfloat16" else dtype
