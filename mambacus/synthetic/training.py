"""One loop for both arms: rows in an order fixed by the seed, AdamW, a linear rise and half a cosine, clipping.

A plain loop and not transformers' Trainer: all rows lie on the device, there is nothing to collate, resume within a run
of seconds, log or audit, and the Trainer's overhead of a step would exceed the step. Optimiser groups and schedule are
those of fine-tuning. On a GPU a whole step is one CUDA graph for each length of row, as models of this size are over
before the CPU has launched them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.runtime.graphs import Recorder
from mambacus.synthetic.arms import Learner
from mambacus.synthetic.examples import Examples, answers_right
from mambacus.synthetic.tasks import IGNORE
from mambacus.tuning.optimiser import parameter_groups, rate_factor

CURVE_POINTS = 20
_SCORED_TOKENS = 65_536  # of one pass of `score`


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train one run; all but the rate and the seed are equal for all runs of a study.

    Attributes:
        steps: optimiser steps.
        tokens: of a step, fill included: as many rows as fit, at least one.
        learning_rate: peak.
        seed: of the order of the rows and their lengths (and, by `mambacus.synthetic.arms.build`, of the weights).
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
    """

    steps: int
    tokens: int
    learning_rate: float
    seed: int
    warmup: float
    weight_decay: float
    clip: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        curve: ``[step, mean loss since the point before]``, at most `CURVE_POINTS` of them.
        seconds: of the loop, without what is compiled before it.
        tokens: read, fill included.
    """

    curve: list[list[float]]
    seconds: float
    tokens: int


def order_of_rows(rows: int, wanted: int, seed: int) -> Tensor:
    """Return int64 (wanted,): every row once in random order, then again in another."""
    draw = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(rows, generator=draw) for _ in range(-(-wanted // rows))]
    return torch.cat(passes)[:wanted]


def rows_of_step(tokens: int, seqlen: int) -> int:
    """Return how many rows of ``seqlen`` tokens a step of ``tokens`` has."""
    return max(1, tokens // seqlen)


class Steps:
    """Training steps whose whole state is on the device, so that each can be recorded once and then repeated.

    A step takes rows of one set. Nothing that differs from one step to the next comes from the CPU: the order of the
    rows, the rates and the numbers of steps taken are tensors that the step itself reads and advances.

    Args:
        learner: on the device of ``sets``.
        sets: training rows, each set of one length.
        plan: how to train.

    Attributes:
        schedule: the set of each step: all of them in random order, then again in another.
        losses: float32 (steps,), 0 where no step was taken yet.
    """

    def __init__(self, learner: Learner, sets: Sequence[Examples], plan: Plan) -> None:
        device = sets[0].input_ids.device
        self._learner, self._sets, self._clip = learner, sets, plan.clip
        self._cuda = device.type == "cuda"
        self.schedule = order_of_rows(len(sets), plan.steps, plan.seed).tolist()
        self.batches = [rows_of_step(plan.tokens, rows.input_ids.shape[1]) for rows in sets]
        times = collections.Counter(self.schedule)
        self._orders = [
            order_of_rows(len(rows), max(1, times[place]) * batch, plan.seed).view(-1, batch).to(device)
            for place, (rows, batch) in enumerate(zip(sets, self.batches, strict=True))
        ]
        warmup = round(plan.warmup * plan.steps)
        factors = [rate_factor(step, total=plan.steps, warmup=warmup) for step in range(plan.steps)]
        self._rates = plan.learning_rate * torch.tensor(factors, device=device)
        self.losses = torch.zeros(plan.steps, device=device)
        self._taken = torch.zeros(1, dtype=torch.long, device=device)
        self._taken_of = [torch.zeros_like(self._taken) for _ in sets]
        groups = parameter_groups(learner, plan.weight_decay)
        rate = torch.tensor(plan.learning_rate, device=device)
        self._optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=self._cuda, capturable=self._cuda)

    def rehearse(self, place: int) -> Tensor:
        """Compile and allocate for a set of rows; nothing is learned."""
        loss = self._backward(self._orders[place][0], place)
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def take(self, place: int) -> Tensor:
        """Take the next step, with rows of set ``place``; return its loss."""
        loss = self._backward(self._orders[place].index_select(0, self._taken_of[place])[0], place)
        torch.nn.utils.clip_grad_norm_(self._learner.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"].copy_(self._rates.index_select(0, self._taken)[0])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, self._taken, loss[None])
        self._taken += 1
        self._taken_of[place] += 1
        return loss

    def _backward(self, rows: Tensor, place: int) -> Tensor:
        """Add the gradients of the mean cross entropy of the answers' tokens in ``rows``; return it."""
        examples = self._sets[place]
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=self._cuda):
            logits = self._learner(examples.input_ids[rows].long(), examples.places[rows].long())
        loss = F.cross_entropy(logits.flatten(0, 1), examples.targets[rows].long().flatten(), ignore_index=IGNORE)
        loss.backward()
        return loss.detach()


def train(learner: Learner, sets: Sequence[Examples], plan: Plan, recorder: Recorder | None) -> Outcome:
    """Train ``learner``, on the device of ``sets``, for ``plan.steps`` steps.

    On a GPU the products run in bfloat16 (autocast over float32 weights); on a CPU everything is float32. Nothing is
    read back before the end.

    Args:
        learner: trained in place.
        sets: training rows, each set of one length; each takes its turn.
        plan: how to train.
        recorder: records a step of each set, which is repeated from then on; None takes all steps as they are.
    """
    device = sets[0].input_ids.device
    learner.to(device).train()
    steps = Steps(learner, sets, plan)
    for place in range(len(sets)):
        rehearse = functools.partial(steps.rehearse, place)
        if recorder:
            recorder.warm_up(rehearse)
        else:
            rehearse()
    repeats: dict[int, Callable[[], None]] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for step, place in enumerate(steps.schedule):
        if recorder and step > 0:  # the first of all makes the optimiser's memory
            if place not in repeats:
                repeats[place], _ = recorder.record(functools.partial(steps.take, place))
            repeats[place]()
        else:
            steps.take(place)
    torch.autograd.graph.increment_version([*learner.parameters()])  # torch does not count what a graph changes
    history = steps.losses.tolist()  # waits for the device
    seconds = time.perf_counter() - began
    lengths = [rows.input_ids.shape[1] for rows in sets]
    return Outcome(_curve(history), seconds, sum(steps.batches[place] * lengths[place] for place in steps.schedule))


def _curve(losses: list[float]) -> list[list[float]]:
    stride = math.ceil(len(losses) / CURVE_POINTS)
    parts = [losses[start : start + stride] for start in range(0, len(losses), stride)]
    ends = [min(start + stride, len(losses)) for start in range(0, len(losses), stride)]
    return [[end, round(sum(part) / len(part), 5)] for end, part in zip(ends, parts, strict=True)]


@torch.inference_mode()
def score(learner: Learner, examples: Examples) -> dict[str, float]:
    """Return what ``learner`` makes of ``examples``, which lie on its device.

    Returns:
        ``accuracy`` (share of answers with every token right), ``token_accuracy``, ``loss`` (nats an answer token),
        ``n`` (answers).
    """
    device = examples.input_ids.device
    learner.eval()
    right = count = tokens_right = tokens = 0
    loss = 0.0
    for rows in torch.arange(len(examples), device=device).split(max(1, _SCORED_TOKENS // examples.input_ids.shape[1])):
        part = Examples(examples.input_ids[rows], examples.places[rows], examples.targets[rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = learner(part.input_ids.long(), part.places.long())
        targets = part.targets.long()
        loss += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum").item()
        predicted, scored = logits.argmax(-1), targets != IGNORE
        found, asked = answers_right(part, predicted)
        right, count = right + found, count + asked
        tokens_right += int((scored & (predicted == targets)).sum())
        tokens += int(scored.sum())
    return {
        "accuracy": right / count,
        "token_accuracy": round(tokens_right / tokens, 6),
        "loss": loss / tokens,
        "n": count,
    }
