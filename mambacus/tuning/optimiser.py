"""What the optimiser is told: which tensors decay and at which rate, and how the rate moves over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

_NO_WEIGHT = re.compile(r"\.A_log$|\.parametrizations\.A_log\.|\.offset\.|(^|\.)beginning\.")


def parameter_groups(
    model: nn.Module, weight_decay: float, rate_of: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with decay; A_log, D, norms, biases and every other vector without.

    ``A_log`` is a matrix but holds the logarithm of the decay rates: pulling it to zero would pull every rate to 1. The
    same goes for what an adapter adds to it, and learned states are no weights either. ``rate`` of a group is the
    factor of its learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim >= 2 and not _NO_WEIGHT.search(name)
            groups.setdefault((weight_decay if is_weight else 0.0, rate_of(name)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    return [{"params": found, "weight_decay": decay, "rate": rate} for (decay, rate), found in ordered]


def rate_factor(step: int, *, total: int, warmup: int) -> float:
    """Return the share of the peak rate at ``step`` (from 0): a linear rise, then half a cosine; 0 only at ``total``.

    Args:
        step: optimiser steps done.
        total: optimiser steps of the run.
        warmup: steps of the rise; the last of them has the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step + 1 - warmup) / (total + 1 - warmup)))
