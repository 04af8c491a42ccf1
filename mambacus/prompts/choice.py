"""Choosing between a prompt and the default, and comparing two prompts on the same items."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mambacus.prompts.prompt import Prompt
from mambacus.runtime.stats import mcnemar_exact, mean, paired_bootstrap

CLEAR = 1.645  # standard errors: one-sided 5 %


@dataclasses.dataclass(frozen=True)
class Solved:
    """A prompt, whether its answers were right, and perhaps how likely the worked ones were (nats), item by item."""

    prompt: Prompt
    correct: Sequence[bool]
    likelihoods: Sequence[float] = ()


def choose(default: Solved, others: Sequence[Solved]) -> tuple[Solved, str]:
    """Return the prompt to use and the reason in words.

    The one of ``others`` with the most right answers, the shorter of equals, replaces the default if it gives more by
    over `CLEAR` standard errors of the paired difference: what wins by less is as likely as not to lose on the test.
    Failing that, and if likelihoods were measured, the one with the likeliest worked answers does among those that
    solve no fewer than the default, if they are likelier by as clear a difference.
    """
    best = max(others, key=lambda solved: (sum(solved.correct), -len(solved.prompt.prefix)), default=default)
    gain, clear = _gain([*map(float, default.correct)], [*map(float, best.correct)])
    if best.prompt != default.prompt and clear:
        return best, f"chosen for solving {100 * gain:.1f} points more of fresh training problems"
    if default.likelihoods:
        as_good = [one for one in others if sum(one.correct) >= sum(default.correct)]
        likeliest = max(as_good, key=lambda solved: sum(solved.likelihoods), default=default)
        gain, clear = _gain(default.likelihoods, likeliest.likelihoods)
        if likeliest.prompt != default.prompt and clear:
            reason = f"chosen for worked answers likelier by {gain:.2f} nats on fresh training problems"
            return likeliest, f"{reason}, of which it solves no fewer"
    return default, "the default prompt was kept: no other was clearly better on fresh training problems"


def _gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, bool]:
    """Return the mean paired difference, and whether it is over `CLEAR` standard errors."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    gain = sum(differences) / len(differences)
    spread = sum((d - gain) ** 2 for d in differences) / max(1, len(differences) - 1)
    return gain, gain > CLEAR * math.sqrt(spread / len(differences))


def gained(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the mean ``difference`` of two scores of the same items with its 95 % interval (paired bootstrap)."""
    first, second = (np.array(values, dtype=np.float64)[:, None] for values in (before, after))
    interval = paired_bootstrap(first, second, mean)
    return {"difference": interval.estimate, "low": interval.low, "high": interval.high}


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Return how ``after`` differs from ``before`` on the same items.

    Returns:
        ``difference`` of the shares with its 95 % interval ``low, high`` (paired bootstrap), ``gained``, ``lost`` and
        McNemar's exact ``p``.
    """
    won = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return {**gained(before, after), "gained": won, "lost": lost, "p": mcnemar_exact(lost, won)}
