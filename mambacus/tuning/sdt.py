"""Sparse dimension tuning: which channels of a layer are worth tuning, found by a short warm-up on a copy.

Source: Galim et al. 2025, Parameter-Efficient Fine-Tuning of State Space Models, arXiv 2410.09016: train the
state-space modules in full for a while, rank channels by how far their decay rates moved, keep the first. Here all
states of a chosen channel are tuned.
"""

from __future__ import annotations

import copy

import torch

from mambacus.models import MambaLM
from mambacus.models.ssm_adapters import mixers
from mambacus.tuning.data import IGNORED
from mambacus.tuning.packing import PlannedBatches

WARM_UP_STEPS = 32


def choose_channels(
    model: MambaLM, data: PlannedBatches, *, share: float, rate: float, steps: int = WARM_UP_STEPS
) -> list[list[int]]:
    """Return for each layer the channels whose decay rates move most when the state-space modules train in full.

    Args:
        model: a plain float32 model; it is not changed.
        data: the micro-batches of the run; the samples of its first ``steps`` steps are used, however they are split.
        share: part of the channels that is chosen, at least one of each layer.
        rate: learning rate of the warm-up.
        steps: optimiser steps of the warm-up, at most those of the run.
    """
    trial = copy.deepcopy(model).requires_grad_(False).train()
    layers = mixers(trial)
    before = [torch.exp(mixer.A_log.detach().clone()) for mixer in layers]
    learned = [tensor for mixer in layers for tensor in (mixer.A_log, mixer.x_proj.weight)]
    for tensor in learned:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    parts = data.plan.parts
    for step in range(min(steps, data.plan.steps)):
        batches = [data[number] for number in range(step * parts, min((step + 1) * parts, len(data)))]
        count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        optimizer.zero_grad()
        for batch in batches:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            trial(**inputs, loss_only=True, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    chosen = []
    for mixer, old in zip(layers, before, strict=True):
        moved = (torch.exp(mixer.A_log.detach()) - old).norm(dim=1)  # (d_inner,)
        wanted = max(1, round(share * len(moved)))
        chosen.append(sorted(moved.topk(wanted).indices.tolist()))
    return chosen
