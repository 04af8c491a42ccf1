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
from mambacus.tuning.packing import PlannedBatches

WARM_UP_STEPS = 32


def choose_channels(
    model: MambaLM, data: PlannedBatches, *, share: float, rate: float, steps: int = WARM_UP_STEPS
) -> list[list[int]]:
    """Return for each layer the channels whose decay rates move most when the state-space modules train in full.

    Args:
        model: a plain float32 model; it is not changed.
        data: the micro-batches of the run, whose first ``steps`` are used.
        share: part of the channels that is chosen, at least one of each layer.
        rate: learning rate of the warm-up.
        steps: optimiser steps of the warm-up, at most as many as there are micro-batches.
    """
    trial = copy.deepcopy(model).requires_grad_(False).train()
    layers = mixers(trial)
    before = [torch.exp(mixer.A_log.detach().clone()) for mixer in layers]
    learned = [tensor for mixer in layers for tensor in (mixer.A_log, mixer.x_proj.weight)]
    for tensor in learned:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    for step in range(min(steps, len(data))):
        batch = {name: tensor.to(model.device) for name, tensor in data[step].items()}
        optimizer.zero_grad()
        trial(**batch, loss_only=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    chosen = []
    for mixer, old in zip(layers, before, strict=True):
        moved = (torch.exp(mixer.A_log.detach()) - old).norm(dim=1)  # (d_inner,)
        wanted = max(1, round(share * len(moved)))
        chosen.append(sorted(moved.topk(wanted).indices.tolist()))
    return chosen
