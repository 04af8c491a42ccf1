"""Several adapters in one model: the changes each makes to the weights, combined with PEFT's functions.

PEFT combines LoRA matrices, where a sum of A's times a sum of B's is not the sum of the products. Here each adapter is
merged for itself (and passes its gate), and what is combined is the change of every weight, whatever made it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError
from mambacus.tuning.merge import untie

RULES = ("linear", "ties", "dare", "dare-ties")


@dataclasses.dataclass(frozen=True)
class Combination:
    """How changes become one.

    Attributes:
        rule: ``linear``: the weighted sum; ``ties``: small changes and changes against the majority's sign are left out
            (Yadav et al. 2023, arXiv 2306.01708); ``dare``: a random share is kept and scaled up, then summed (Yu et
            al. 2023, arXiv 2311.03099); ``dare-ties``: both.
        weights: factor of each adapter.
        density: share of the changes that ``ties`` and ``dare`` keep.
        seed: of what ``dare`` drops.
    """

    rule: str
    weights: tuple[float, ...]
    density: float
    seed: int

    def apply(self, changes: Sequence[Tensor]) -> Tensor:
        """Return one change of a weight for those of all adapters, float32 of the same shape."""
        from peft.utils import merge_utils

        tensors, factors = list(changes), torch.tensor(self.weights, device=changes[0].device)
        if self.rule == "linear":
            combined = merge_utils.task_arithmetic(tensors, factors)
        elif self.rule == "ties":
            combined = merge_utils.ties(tensors, factors, self.density)
        elif self.rule == "dare":
            combined = merge_utils.dare_linear(tensors, factors, self.density)
        else:
            combined = merge_utils.dare_ties(tensors, factors, self.density)
        return combined


def check_rule(rule: str, weights: Sequence[float], adapters: int) -> tuple[float, ...]:
    """Return one weight for each adapter; without any given, 1 for one and equal shares for several.

    Raises:
        UserError: an unknown rule or another number of weights.
    """
    if rule not in RULES:
        raise UserError(f"--combine: expected one of {', '.join(RULES)}, got {rule!r}")
    if weights and len(weights) != adapters:
        raise UserError(f"--weights: expected {adapters}, one for each adapter, got {len(weights)}")
    return tuple(weights) or (1.0 / adapters,) * adapters


def parameters_of(model: MambaLM) -> dict[str, Tensor]:
    """Return copies of all weights on the CPU, that of a tied head under its own name too."""
    tensors = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    tensors.setdefault("lm_head.weight", tensors["backbone.embeddings.weight"])
    return tensors


@torch.no_grad()
def combine(base: MambaLM, tuned: Sequence[Mapping[str, Tensor]], how: Combination, *, untied: bool) -> MambaLM:
    """Change ``base`` in place by the combined changes of all adapters.

    Args:
        base: the plain model in float32.
        tuned: `parameters_of` the model after each single merge.
        how: rule and weights.
        untied: a merge had to untie the head from the embedding.

    Raises:
        UserError: an adapter changed the shape of a weight, or a combined weight is not finite.
    """
    if untied and base.config.tie_embeddings:
        untie(base)
    torch.manual_seed(how.seed)
    for name, parameter in base.named_parameters():
        shapes = {tuple(tensors[name].shape) for tensors in tuned} | {tuple(parameter.shape)}
        if len(shapes) > 1:
            raise UserError(f"--adapter: {name} has the shapes {sorted(shapes)}; only changes of one shape combine")
        changes = [tensors[name].to(parameter.device) - parameter for tensors in tuned]
        if not any(bool(change.any()) for change in changes):
            continue
        changed = parameter + how.apply(changes)
        if not changed.isfinite().all():
            raise UserError(f"the merge failed: the combined {name} is not finite")
        parameter.copy_(changed)
    return base
