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
    """A prompt and whether its answers were right, item by item."""

    prompt: Prompt
    correct: Sequence[bool]


def choose(default: Solved, others: Sequence[Solved]) -> tuple[Solved, str]:
    """Return the prompt to use and the reason in words.

    The one of ``others`` with the most right answers, the shorter of equals, replaces the default if it gives more by
    over `CLEAR` standard errors of the paired difference: what wins by less is as likely as not to lose on the test.
    """
    best = max(others, key=lambda solved: (sum(solved.correct), -len(solved.prompt.prefix)), default=default)
    differences = [float(b) - float(a) for a, b in zip(default.correct, best.correct, strict=True)]
    gain = sum(differences) / len(differences)
    spread = sum((d - gain) ** 2 for d in differences) / max(1, len(differences) - 1)
    if best.prompt != default.prompt and gain > CLEAR * math.sqrt(spread / len(differences)):
        return best, f"chosen for solving {100 * gain:.1f} points more of fresh training problems"
    return default, "the default prompt was kept: no other solved clearly more fresh training problems"


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Return how ``after`` differs from ``before`` on the same items.

    Returns:
        ``difference`` of the shares with its 95 % interval ``low, high`` (paired bootstrap), ``gained``, ``lost`` and
        McNemar's exact ``p``.
    """
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    first, second = (np.array(values, dtype=np.float64)[:, None] for values in (before, after))
    interval = paired_bootstrap(first, second, mean)
    return {
        "difference": interval.estimate, "low": interval.low, "high": interval.high,
        "gained": gained, "lost": lost, "p": mcnemar_exact(lost, gained),
    }  # fmt: skip
