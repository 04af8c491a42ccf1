"""Grade-school word problems of one to four steps, generated from a seed, with disjoint training and test templates.

>>> generate(1, split="train", seed=0)[0].solution.splitlines()[-1]
'#### 50'

Every line of a solution but the last shows one equation (``12 - 5 = 7 apples``); the last is ``#### N``. Three
held-out splits share no sentence with the training templates, only plans (which operations follow each other):

- ``test``: situations that the embedded model read as stories in pre-training (other numbers, never a question);
- ``reworded``: situations it was told, in words it has not read;
- ``novel``: situations it has not read of.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import ANSWER_MARK
from mambacus.data.templates import Drawn, Template, load_templates
from mambacus.runtime.errors import UserError, suggest

STEP_WEIGHTS = {1: 0.35, 2: 0.35, 3: 0.18, 4: 0.12}
DISTRACTOR_RATE = 0.15
MAX_REPEATS = 1_000

SPLITS = ("train", "test", "reworded", "novel")  # each a file of texts/

DISTRACTORS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "{A} lives at number {d} on Mill Street.",
        "{A}'s room has {d} pictures on the wall.",
        "{A} has {d} cousins in another town.",
        "{A} took bus number {d} this morning.",
    ),
    "test": (
        "{A}'s team shirt carries the number {d}.",
        "{A} found this story on page {d} of a magazine.",
        "{A} can whistle {d} songs.",
    ),
}


@dataclasses.dataclass(frozen=True)
class WordProblem(MathProblem):
    """A generated problem.

    Attributes:
        template: key of the template it was made from.
        steps: number of equations in its solution.
        distractors: numbers in the question that the solution does not use.
    """

    template: str = ""
    steps: int = 0
    distractors: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """``1 step``, ``2 steps`` ..."""
        return f"{self.steps} step{'s' if self.steps > 1 else ''}"


def by_steps(split: str) -> dict[int, list[Template]]:
    """Return the templates of a split (a key of `SPLITS`), grouped by their number of steps."""
    groups: dict[int, list[Template]] = {count: [] for count in STEP_WEIGHTS}
    for template in load_templates(split):
        groups[len(template.steps)].append(template)
    return groups


def generate(n: int, split: str = "train", seed: int = 0, steps: int | None = None) -> list[WordProblem]:
    """Return ``n`` problems with different questions; the same arguments give the same problems on every machine.

    A longer list starts with the shorter one of the same seed.

    Args:
        n: number of problems.
        split: ``train``, ``test``, ``reworded`` or ``novel``.
        seed: any integer; splits are independent at equal seeds.
        steps: only problems of this many steps (1 to 4); None mixes them by `STEP_WEIGHTS`.

    Raises:
        UserError: unknown split, ``steps`` outside 1 to 4, negative ``n``, or more problems than templates can give.
    """
    if split not in SPLITS:
        raise UserError(
            f"wordproblems: split must be one of {', '.join(SPLITS)}, got {split!r}{suggest(split, SPLITS)}"
        )
    if steps is not None and steps not in STEP_WEIGHTS:
        raise UserError(f"wordproblems: steps must be 1, 2, 3 or 4, got {steps}")
    if n < 0:
        raise UserError(f"wordproblems: expected a number of problems >= 0, got {n}")
    templates = by_steps(split)
    rng = random.Random(f"wordproblems/{split}/{seed}/{steps}")
    problems: list[WordProblem] = []
    seen: set[str] = set()
    repeats = 0
    while len(problems) < n:
        count = steps or rng.choices(list(STEP_WEIGHTS), weights=list(STEP_WEIGHTS.values()))[0]
        template = rng.choice(templates[count])
        problem = _make(template, split, f"wordproblems-{split}-{seed}-{len(problems):05d}", rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
            repeats = 0
        elif (repeats := repeats + 1) > MAX_REPEATS:
            raise UserError(
                f"wordproblems: no more than about {len(problems)} different problems of {steps} steps exist"
            )
    return problems


def _make(template: Template, split: str, identifier: str, rng: random.Random) -> WordProblem:
    drawn = template.draw(rng)
    sentences = [drawn.text(template.story, rng), drawn.text(template.ask, rng)]
    distractors: tuple[int, ...] = ()
    if "A" in template.people and rng.random() < DISTRACTOR_RATE:
        distractors = (rng.randint(2, 60),)
        text = rng.choice(DISTRACTORS["train" if split == "train" else "test"])
        sentences.insert(0, text.format_map({**drawn.slots, "d": distractors[0]}))
    return WordProblem(
        id=identifier,
        question=" ".join(sentences),
        answer=str(drawn.answer),
        solution=solution(drawn),
        source=f"wordproblems generator, {split} templates",
        template=template.key,
        steps=len(template.steps),
        distractors=distractors,
    )


def solution(drawn: Drawn) -> str:
    """Return the worked solution: one equation a line, then ``#### N``."""
    lines = [drawn.line(step) for step in drawn.template.steps]
    return "\n".join([*lines, f"{ANSWER_MARK} {drawn.answer}"])
