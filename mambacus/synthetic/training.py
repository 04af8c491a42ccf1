"""One loop for both arms: rows in an order fixed by the seed, AdamW, a linear rise and half a cosine, clipping.

A plain loop and not transformers' Trainer: all rows lie on the device at one length, there is nothing to collate,
resume within a run of seconds, log or audit, and the Trainer's overhead of a step would exceed the step. Optimiser
groups and schedule are those of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.synthetic.arms import Learner
from mambacus.synthetic.examples import Examples, answers_right
from mambacus.synthetic.tasks import IGNORE
from mambacus.tuning.trainer import parameter_groups, rate_factor

CURVE_POINTS = 20
_SCORED_TOKENS = 65_536  # of one pass of `score`


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train one run; all but the rate and the seed are equal for all runs of a study.

    Attributes:
        steps: optimiser steps.
        batch: rows of a step.
        learning_rate: peak.
        seed: of the order of the rows (and, by `mambacus.synthetic.arms.build`, of the weights).
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
    """

    steps: int
    batch: int
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
    """

    curve: list[list[float]]
    seconds: float


def order_of_rows(rows: int, plan: Plan) -> Tensor:
    """Return int64 (steps * batch,): every row once in random order, then again in another."""
    draw = torch.Generator().manual_seed(plan.seed)
    wanted = plan.steps * plan.batch
    passes = [torch.randperm(rows, generator=draw) for _ in range(-(-wanted // rows))]
    return torch.cat(passes)[:wanted]


def train(learner: Learner, examples: Examples, plan: Plan) -> Outcome:
    """Train ``learner``, on the device of ``examples``, for ``plan.steps`` steps.

    The loss is the mean cross entropy of the answers' tokens. On a GPU the products run in bfloat16 (autocast over
    float32 weights) and nothing is read back before the end; on a CPU everything is float32.
    """
    device = examples.input_ids.device
    cuda = device.type == "cuda"
    learner.to(device).train()
    groups = parameter_groups(learner, plan.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=cuda)
    order = order_of_rows(len(examples), plan).to(device)
    losses = torch.zeros(plan.steps, device=device)

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = learner(examples.input_ids[rows].long(), examples.places[rows].long())
        return F.cross_entropy(logits.flatten(0, 1), examples.targets[rows].long().flatten(), ignore_index=IGNORE)

    loss_of(order[: plan.batch]).backward()  # compiles and allocates, outside the clock; no step is taken
    optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for step, rows in enumerate(order.split(plan.batch)):
        factor = rate_factor(step, total=plan.steps, warmup=round(plan.warmup * plan.steps))
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * factor
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
    history = losses.tolist()  # waits for the device
    return Outcome(_curve(history), time.perf_counter() - began)


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
