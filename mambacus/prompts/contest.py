"""What comes after the search: the finals on fresh problems, the best of random prompts, and the test."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mambacus.prompts.board import summary
from mambacus.prompts.choice import Solved, choose, gained, paired
from mambacus.prompts.judge import PromptJudge
from mambacus.prompts.prompt import DEFAULT, Prompt
from mambacus.prompts.space import Space
from mambacus.runtime.stats import wilson


def finals(judge: PromptJudge, finalists: Sequence[Prompt], *, by_likelihood: bool) -> tuple[dict[str, Any], Prompt]:
    """Let the finalists and the default solve fresh problems; return the figures and the prompt to use.

    Args:
        judge: of those problems.
        finalists: the best prompts of a search.
        by_likelihood: measure their worked answers too, which `choose` then looks at where the right answers tell
            nothing.
    """
    n = len(judge.problems)
    solved = [
        Solved(
            prompt,
            [answer.correct for answer in judge.answers(prompt, n)],
            judge.likelihoods(prompt, n) if by_likelihood else (),
        )
        for prompt in dict.fromkeys([DEFAULT, *finalists])
    ]
    chosen, reason = choose(solved[0], solved[1:])
    candidates = [
        {"prompt": summary(one.prompt), "correct": sum(one.correct)}
        | ({"loglikelihood": sum(one.likelihoods) / n} if by_likelihood else {})
        for one in solved
    ]
    figures = {"items": n, "candidates": candidates, "chosen": summary(chosen.prompt), "reason": reason}
    return figures | {"tokens": judge.tokens.as_dict()}, chosen.prompt


def random_best(judge: PromptJudge, space: Space, prompts: int, items: int, seed: int) -> dict[str, Any]:
    """Return the best of random prompts by the score that the search uses, and what finding it cost.

    Returns:
        ``prompts``, ``best`` (in words), ``mean``, ``tokens`` and the ``prompt``; nothing if ``prompts`` is 0.
    """
    if not prompts:
        return {}
    chance = random.Random(f"prompts/random/{seed}")
    drawn = [space.draw(chance) for _ in range(prompts)]
    best = max(drawn, key=lambda prompt: sum(judge.scores(prompt, items)))
    mean = sum(judge.scores(best, items)) / items
    found = {"prompts": len(drawn), "best": summary(best), "mean": mean}
    return found | {"tokens": judge.tokens.as_dict(), "prompt": best}


def confirm(judge: PromptJudge, rivals: Mapping[str, Prompt]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let each rival solve the test problems once; return the figures and the items.

    Args:
        judge: of the test problems.
        rivals: prompts by name; ``optimised`` is compared with each of the others.

    Returns:
        ``n``; ``prompts`` with ``correct``, ``accuracy``, ``wilson95`` and ``loglikelihood`` (mean of the worked
        answers, in nats a problem); ``optimised_against`` with the paired differences of both; ``tokens``.
    """
    n = len(judge.problems)
    answers = {name: judge.answers(prompt, n) for name, prompt in rivals.items()}
    likelihoods = {name: judge.likelihoods(prompt, n) for name, prompt in rivals.items()}
    right = {name: [answer.correct for answer in found] for name, found in answers.items()}
    figures = {
        name: {
            "prompt": summary(prompt), "correct": sum(right[name]), "accuracy": sum(right[name]) / n,
            "wilson95": list(wilson(sum(right[name]), n)), "loglikelihood": sum(likelihoods[name]) / n,
        }
        for name, prompt in rivals.items()
    }  # fmt: skip
    items = [
        {"rival": name, **dataclasses.asdict(answer), "loglikelihood": likelihood}
        for name, found in answers.items()
        for answer, likelihood in zip(found, likelihoods[name], strict=True)
    ]
    comparisons = {
        name: paired(right[name], right["optimised"])
        | {"loglikelihood": gained(likelihoods[name], likelihoods["optimised"])}
        for name in rivals
        if name != "optimised"
    }
    return {"n": n, "prompts": figures, "optimised_against": comparisons, "tokens": judge.tokens.as_dict()}, items
