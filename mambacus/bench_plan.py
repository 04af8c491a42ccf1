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
    ("scan", "cuda"): Defaults(dtypes=("bfloat16",)),
    ("eval", "cpu"): Defaults("tiny"),
    ("eval", "cuda"): Defaults("1.4b", dtypes=("bfloat16",)),
}


def told(name: str) -> str:
    """Return in words what a setting is unless it is given: by kind and device, those that share a value together."""
    groups: dict[str, list[str]] = {}
    for (what, kind), default in _DEFAULTS.items():
        if name in COUNTS[what] | _EVERYWHERE and getattr(default, name) != getattr(Defaults(), name):
            groups.setdefault(_words(getattr(default, name)), []).append(f"{what} on {kind}")
    others = _words(getattr(Defaults(), name))
    return "; ".join([f"default: {others}", *(f"{', '.join(kinds)}: {value}" for value, kinds in groups.items())])


def _words(value: str | tuple[object, ...]) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value))


FLOATS = ("float32", "bfloat16", "float16")
_EVERYWHERE = {
    "what", "out", "label", "device", "threads", "dtypes", "overwrite",
    "data_dir",  # a study gives it to all of its commands
}  # fmt: skip
_CASES = {
    "model", "implementations", "batches", "modes", "repeats", "warmup", "peer_repeats", "peer_dtypes", "timeout",
    "resume",
}  # fmt: skip
COUNTS: dict[str, set[str]] = {
    "train": _CASES | {"seqlens", "method"},
    "decode": _CASES | {"prompts", "new_tokens", "samples", "logits"},
    "prefill": _CASES | {"seqlens", "logits"},
    "lengths": _CASES | {"seqlens", "new_tokens", "method", "logits"},
    "scan": {"shapes"},
    "eval": {"model", "timeout", "documents", "peer_documents", "tuned"},
}  # the settings that change what a kind does, beside those that count everywhere


def idle(config: Config) -> list[str]:
    """Return a clause for each setting that was changed and that this kind of benchmark would not heed."""
    faults = []
    for field in dataclasses.fields(config):
        changed = field.default is not dataclasses.MISSING and getattr(config, field.name) != field.default
        if changed and field.name not in _EVERYWHERE | COUNTS[config.what]:
            kinds = ", ".join(kind for kind, settings in COUNTS.items() if field.name in settings)
            faults.append(f"--{field.name.replace('_', '-')}: expected with {kinds}, not with {config.what}")
    if config.what == "eval" and len(config.dtypes) > 1:
        faults.append(f"--dtypes: expected one for eval, got {','.join(config.dtypes)}")
    if config.what in ("scan", "eval") and (wrong := [name for name in config.dtypes if name not in FLOATS]):
        faults.append(f"--dtypes: expected of {', '.join(FLOATS)} for {config.what}, got {','.join(wrong)}")
    return faults


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
    """Yield the cases of a filled configuration, each once."""
    yield from dict.fromkeys(_cases(config))


def _cases(config: Config) -> Iterator[Case]:
    """Yield them in order; two pairs of dtypes may share one side's case."""
    for benchmark in WHAT[config.what]:
        if benchmark == "samples" and not config.samples:
            continue
        shapes = list(_shapes(config, benchmark))
        for dtypes, (batch, seqlen, new_tokens), mode in itertools.product(_dtypes(config), shapes, config.modes):
            for name in config.implementations:
                ours = name == "mambacus"
                dtype = dtypes[0 if ours else 1]
                if dtype is None:
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


def _dtypes(config: Config) -> list[tuple[str | None, str | None]]:
    """Return what is measured in turn: our dtype and that of the peers, None where that side has no such case."""
    ours, peers = config.dtypes, config.peer_dtypes or config.dtypes
    if len(ours) == len(peers):
        return list(zip(ours, peers, strict=True))
    names = dict.fromkeys((*ours, *peers))
    return [(name if name in ours else None, name if name in peers else None) for name in names]


def _shapes(config: Config, benchmark: str) -> Iterator[tuple[int, int, int]]:
    """Yield batch, tokens a row and new tokens of the cases of one benchmark."""
    lengths = config.prompts if config.what == "decode" else config.seqlens
    steps = (0,) if benchmark in ("prefill", "train") else config.new_tokens
    batches = (1,) if benchmark == "samples" else config.batches
    yield from itertools.product(batches, lengths, steps)


def _dtype(config: Config, benchmark: str, dtype: str) -> str:
    """Return the dtype of a case: training beside bfloat16 inference has float32 weights under autocast."""
    return "mixed" if config.what == "lengths" and benchmark == "train" and dtype == "bfloat16" else dtype
