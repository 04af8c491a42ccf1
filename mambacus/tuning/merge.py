"""Folding an adapter into its model, and the gate that nothing passes which does not compute the same.

PEFT merges an adapter on a tied embedding into the output head as well, without a warning: the model that comes out is
destroyed. Here such a matrix is untied first, and a merge counts only if the logits on real prompts agree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.data.prompts import qa_prompt
from mambacus.models import MambaLM
from mambacus.models.ssm_adapters import fold
from mambacus.runtime.errors import UserError

RELATIVE_TOLERANCE = 1e-4
TIED = ("embeddings", "lm_head")

PROMPTS = (
    qa_prompt("Lena has 14 stamps. Her uncle gives her 9 more and she loses 5. How many stamps does she have now?"),
    qa_prompt("A bus has 6 rows of 4 seats. 17 seats are taken. How many are free?"),
    qa_prompt("Three friends share 48 euros equally and each spends 7 euros. How much is left to each of them?"),
    qa_prompt("A train leaves at 9:40 and rides 135 minutes. When does it arrive?"),
    "12 + 35 = 47. 47 - 8 = 39. 39 * 2 =",
    "The sum of 128 and 256 is",
    "Once upon a time there was an old clockmaker who lived at the edge of a forest.",
    "The capital of France is",
    "Water boils when it is heated because",
    "def factorial(n):\n    return 1 if n < 2 else",
    "She opened the letter, read it twice, and then, without a word,",
    "In 1905 a clerk in a patent office wrote four papers. The first",
)


def untie(model: MambaLM) -> None:
    """Give the output head a copy of the embedding matrix, in place, and say so in the configuration.

    The model computes the same before and after. It may carry adapters on either matrix.
    """
    head: Any = model.lm_head
    head = getattr(head, "base_layer", head)  # inside an adapter's wrapper
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config = dataclasses.replace(model.config, tie_embeddings=False)


def merge(attached: Any) -> tuple[MambaLM, bool]:
    """Fold an adapter into the weights of its model, in place.

    Args:
        attached: what ``mambacus.models.load(..., adapter=...)`` gave, in float32.

    Returns:
        The plain model, and whether its head had to be untied from the embedding.

    Raises:
        UserError: a merged weight is not finite, or the method cannot be merged; the message says why.
    """
    if isinstance(attached, MambaLM):
        return fold(attached), False
    model: MambaLM = attached.get_base_model()
    untied = model.config.tie_embeddings and any(touched(attached, name) for name in TIED)
    if untied:
        untie(model)
    try:
        merged: MambaLM = attached.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"the merge failed: {' '.join(str(error).split())}") from None
    return merged, untied


def touched(attached: nn.Module, name: str) -> bool:
    """Return whether an adapter sits on a module called ``name``."""
    return any(
        path.rpartition(".")[2] == name and hasattr(module, "base_layer") for path, module in attached.named_modules()
    )


@torch.no_grad()
def prompt_logits(model: nn.Module, tokenizer: Any) -> list[Tensor]:
    """Return the float32 logits of every prompt of the gate, each (tokens, vocabulary), on the CPU."""
    logits = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
        logits.append(model(input_ids=ids).logits[0].float().cpu())
    return logits


def compare(reference: list[Tensor], candidate: list[Tensor]) -> dict[str, float | int]:
    """Return ``{prompts, max_logit_difference, scale, tolerance}``: the largest difference and what it may be.

    ``tolerance`` is `RELATIVE_TOLERANCE` times ``scale``, the largest absolute logit of the reference, at least 1.
    """
    # torch's max, unlike Python's, lets a NaN through
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(reference, candidate, strict=True)]).max())
    scale = max(1.0, float(torch.stack([logits.abs().max() for logits in reference]).max()))
    return {
        "prompts": len(reference),
        "max_logit_difference": difference,
        "scale": scale,
        "tolerance": RELATIVE_TOLERANCE * scale,
    }


def gate(reference: list[Tensor], candidate: list[Tensor]) -> dict[str, float | int]:
    """Return `compare`, or refuse.

    Raises:
        UserError: the logits differ by more than the tolerance, or are not finite.
    """
    result = compare(reference, candidate)
    if not result["max_logit_difference"] <= result["tolerance"]:  # also true of NaN
        raise UserError(
            f"merge refused: on {result['prompts']} prompts the logits of merged and attached model differ by up to "
            f"{result['max_logit_difference']:.3g}, allowed are {result['tolerance']:.3g}; nothing was written"
        )
    return result
