"""An estimate of a step's operations, time and memory, from its work, its model's shape and this device's speed.

The factors below were read off records on two machines (docs/study.md says which): good to about a factor of two, which
a slow test holds for the recipe ``smoke``. What cannot be counted is unknown, never zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mambacus.studies.plan import Plan, Step
from mambacus.studies.workload import Work, token_factor, work_of

if TYPE_CHECKING:
    from mambacus.models.costs import Costs

# Shares of a large matrix product's speed that a model reaches.
READING = {"cpu": 0.7, "cuda": 0.5}
TRAINING = {"cpu": 0.5, "cuda": 0.35}  # the products' share of a step in one dtype
DECODING = {"cpu": 0.4, "cuda": 0.2}
STREAMING = 0.5  # share of the copy's bytes a second at which weights are read for each generated token
# Small operations that one layer starts in one pass: ours on a GPU replays them as a graph when it generates.
OPERATIONS = {("ours", "cpu"): 40, ("ours", "cuda"): 30, ("hf", "cpu"): 80, ("hf", "cuda"): 80}
GRAPH_OPERATIONS = 6
HOST = 0.0001  # seconds a generated token spends in Python: sampling, stop strings, text
DOCUMENT = 0.003  # seconds to lay out a document's requests and to score its answers
PREPARED = 0.0003  # seconds to load one row and make a document of it
FIRST_STEP = 12.0  # seconds: imports, and kernels compiled or read from their cache
EVERY_STEP = 0.4
LOADING = 1e9  # bytes of weights read and placed a second
PEER_FACTORS = {"mambacus": 1.0, "transformers": 6.0}  # a side's time in ours: transformers' Mamba is a loop
OTHER_PEER = 1.5
BENCH_PROCESS = 8.0  # seconds: each case of a benchmark is a process of its own
BACKWARD = {"adapter": 2.2, "full": 3.0}  # forward and backward in forward passes; the scan's states are computed again
REPORT_SECONDS = (3.0, 0.5)  # a page with its figures, and for each model on it
PROCESS_BYTES = {"cpu": 0.9e9, "cuda": 0.6e9}  # Python with its libraries; the GPU's context
LOGIT_BYTES = 2.7e8  # float32 logits that our scorer holds at once
SAVED_NUMBERS = 14  # numbers that training keeps for each token, layer and unit of width


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured on this device, see `mambacus.measuring.speed.measure_speed`.

    Attributes:
        device: ``cpu`` or ``cuda``.
        figures: its measurements.
        bfloat16: it multiplies bfloat16 in hardware, so that training does.
    """

    device: str
    figures: Mapping[str, float]
    bfloat16: bool = False

    def gemm(self, dtype: str, width: int) -> float:
        """Return operations a second; on a CPU the better of the two dtypes, whose kernels of ours need no hardware."""
        names = ("float32", dtype) if self.device == "cpu" else (dtype,)
        return max(self.figures.get(f"gemm_{name}_{width}", 0.0) for name in names)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step would take.

    Attributes:
        tokens: tokens through the model, of its own tokenizer; None if unknown.
        flops: floating-point operations; None if unknown.
        seconds: wall-clock time; None if unknown.
        memory_bytes: peak: of the process on a CPU, of the GPU's memory on a GPU; None if unknown.
        unknown: what is not known, empty if all is.
    """

    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    memory_bytes: float | None = None
    unknown: str = ""


def sources_of(plan: Plan) -> dict[str, str]:
    """Return for every model path that the study makes the model it was tuned from."""
    made: dict[str, str] = {}
    for step in plan.steps:
        if step.verb == "finetune":
            made[str(step.config.out / "adapter")] = step.config.model
            made[str(step.config.out / "model")] = step.config.model
        if step.verb == "merge":
            made[str(step.config.out)] = made[str(step.config.adapter[0])]
    return made


def source_of(step: Step, made: Mapping[str, str]) -> str:
    """Return the model that a step runs, by the name it had before the study."""
    if step.verb == "merge":
        return made[str(step.config.adapter[0])]
    name = str(step.config.model)
    return f"random:{name}" if step.verb == "bench" else made.get(name, name)


def dtype_of(step: Step, bfloat16: bool) -> str:
    """Return the dtype of a step's matrix products; the default of training is ``bfloat16`` where hardware has it."""
    if step.verb == "bench":
        return "bfloat16" if {"bfloat16", "mixed"} & set(step.config.dtypes) else "float32"
    dtype = str(step.config.dtype)
    if dtype == "auto":
        return "bfloat16" if bfloat16 else "float32"
    return dtype


def estimate_plan(plan: Plan, costs: Mapping[str, Costs | None], speed: Speed) -> list[Estimate]:
    """Return one estimate for every step of ``plan`` and a last one for its report.

    Args:
        plan: the study.
        costs: shape of every model by `source_of`; None where it is not known here.
        speed: of this device.
    """
    made = sources_of(plan)
    found = []
    for place, step in enumerate(plan.steps):
        source = source_of(step, made)
        shape = costs[source]
        if shape is None:
            found.append(Estimate(unknown=f"shape of {source}"))
            continue
        tuned = str(getattr(step.config, "model", "")) in made or bool(getattr(step.config, "adapter", None))
        work = work_of(step, token_factor(source, shape.vocab_size), ours=shape.family == "mamba", tuned=tuned)
        estimate = estimate_step(step, work, shape, speed)
        if place == 0 and estimate.seconds is not None:
            estimate = dataclasses.replace(estimate, seconds=estimate.seconds + FIRST_STEP)
        found.append(estimate)
    return [*found, Estimate(seconds=REPORT_SECONDS[0] + REPORT_SECONDS[1] * len(plan.models))]


def estimate_step(step: Step, work: Work, shape: Costs, speed: Speed) -> Estimate:
    """Return the estimate of one step."""
    if work.unknown:
        return Estimate(unknown=work.unknown)
    size = 4 if dtype_of(step, speed.bfloat16) == "float32" or step.verb in ("finetune", "merge") else 2
    weights = shape.total_parameters * size
    if step.verb == "merge":
        return Estimate(seconds=EVERY_STEP + 4 * weights / LOADING, memory_bytes=PROCESS_BYTES["cpu"] + 2.5 * weights)
    backward = BACKWARD["full" if step.config.method == "full" else "adapter"] if step.verb == "finetune" else 3.0
    attended = shape.context_flops * work.longest / 2
    forward = shape.total_flops + attended
    flops = (work.read + work.generated) * forward + work.trained * forward * backward
    seconds = _seconds(step, work, shape, speed, forward, backward, weights)
    if step.verb == "bench":
        sides = step.config.implementations
        cases = len(step.config.dtypes) * len(step.config.batches) * len(step.config.modes)
        cases *= {"decode": 3, "lengths": 3 * len(step.config.seqlens)}.get(step.config.what, 1)
        seconds = seconds * sum(PEER_FACTORS.get(name, OTHER_PEER) for name in sides) + BENCH_PROCESS * cases * len(
            sides
        )
    return Estimate(work.tokens, flops, seconds, _memory(step, work, shape, speed, weights, size))


def _seconds(
    step: Step, work: Work, shape: Costs, speed: Speed, forward: float, backward: float, weights: float
) -> float:
    gemm = speed.gemm(dtype_of(step, speed.bfloat16), shape.width)
    call = speed.figures["call_seconds"]
    side = "ours" if shape.family == "mamba" else "hf"
    layer = OPERATIONS[side, speed.device] * call * shape.n_layer
    graph = side == "ours" and speed.device == "cuda" and getattr(step.config, "adapter", None) is None
    one_token = GRAPH_OPERATIONS * call * shape.n_layer if graph else layer
    reading = work.read * forward / (gemm * READING[speed.device]) + work.passes * layer
    rest = speed.gemm("float32", shape.width) if speed.device == "cpu" else gemm  # scan and sums know no bfloat16 there
    for_operation = 1 / gemm + (1 / TRAINING[speed.device] - 1) / rest
    training = work.trained * forward * backward * for_operation + work.train_steps * 4 * layer
    decoding = (
        work.generated * (forward / (gemm * DECODING[speed.device]) + HOST)
        + work.decode_steps * (one_token + weights / (speed.figures["copy"] * STREAMING))
    )  # fmt: skip
    around = EVERY_STEP + weights / LOADING + work.documents * DOCUMENT + work.prepared * PREPARED
    return reading + training + decoding + around


def _memory(step: Step, work: Work, shape: Costs, speed: Speed, weights: float, size: int) -> float:
    """Return bytes: the process, the weights, and what a batch holds: activations, logits, state or cache."""
    held = work.rows * work.longest
    if work.trained:
        small = 2 if dtype_of(step, speed.bfloat16) == "bfloat16" else 4
        saved = held * shape.n_layer * SAVED_NUMBERS * shape.width * small
        logits = held * shape.vocab_size * 4 * (2 if speed.device == "cpu" else 0.25)  # a GPU holds parts of them
        full = step.verb == "finetune" and step.config.method == "full"
        masters = 3 * shape.total_parameters * 4 if full else 0.0  # gradients and AdamW's two moments
        if step.verb == "finetune" and step.config.checkpointing:
            saved /= shape.n_layer
        return PROCESS_BYTES[speed.device] + weights + masters + saved + logits
    past = work.rows * shape.state_bytes(size, int(work.longest))
    if shape.family == "mamba":
        held = min(held, LOGIT_BYTES / (4 * shape.vocab_size))  # our scorer reads long rows in parts
    pass_ = held * (SAVED_NUMBERS * shape.width * size + 2 * shape.vocab_size * 4)
    return PROCESS_BYTES[speed.device] + weights + past + pass_
