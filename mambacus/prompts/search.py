"""The search: rounds of successive halving over prompts and edits of the best.

In a round every prompt is scored on the same few items; the better half goes on to twice as many, up to the whole
slice. Since all prompts of a rung meet the same items, their means are compared in pairs. The next round starts from
the best so far and edits of them. The default prompt is never dropped. Scores are asked for item by item and kept, so a
prompt that survives pays for the new items alone.

Source: Jamieson and Talwalkar 2016 (successive halving).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from mambacus.prompts.prompt import DEFAULT, Prompt
from mambacus.prompts.space import Space

_ANY = "any question"


class BudgetSpentError(Exception):
    """The next scores would cost more tokens than are left."""


class Judge(Protocol):
    """Scores prompts; higher is better."""

    def scores(self, prompt: Prompt, items: int) -> Sequence[float]:
        """Return the scores on the first ``items`` of the slice.

        Raises:
            BudgetSpentError: they would cost more than is left.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        population: prompts of a round.
        rounds: rounds of halving.
        first: items of the first rung.
        items: of the whole slice, the last rung.
        eta: of ``eta`` prompts one goes on to a rung of ``eta`` times the items.
        parents: prompts that a round hands to the next.
        seed: of drawing and editing.
    """

    population: int = 24
    rounds: int = 3
    first: int = 8
    items: int = 64
    eta: int = 2
    parents: int = 4
    seed: int = 0

    @property
    def rungs(self) -> list[int]:
        """Items of each rung, ascending."""
        sizes = []
        size = self.first
        while size < self.items:
            sizes.append(size)
            size *= self.eta
        return [*sizes, self.items]


@dataclasses.dataclass(frozen=True)
class Standing:
    """A prompt, its mean score, on how many items, and how it came about (``default``, ``random``, an operator)."""

    prompt: Prompt
    mean: float
    items: int
    origin: str


@dataclasses.dataclass(frozen=True)
class Rung:
    """What is told after each rung: round and rung from 1, items, prompts scored, and the standings, best first."""

    round: int
    rung: int
    items: int
    prompts: int
    standings: tuple[Standing, ...]


@dataclasses.dataclass
class Outcome:
    """What a search found.

    Attributes:
        standings: of the prompts scored on the most items, best first; the default is among them.
        rungs: every rung, in order.
        tried: number of different prompts scored at all.
        ended: ``rounds`` (all were run) or ``budget``.
    """

    standings: tuple[Standing, ...]
    rungs: list[Rung]
    tried: int
    ended: str


Proposer = Callable[[Sequence[Standing]], Sequence[Prompt]]


class Search:
    """One search.

    Args:
        space: what prompts are made of.
        judge: scores them.
        settings: how.
        tell: called after each rung.
        propose: gives further prompts for a round, from the standings so far; their origin is ``proposed``.
        first: prompts of the first round beside the default; their origin is ``given``.
    """

    def __init__(
        self,
        space: Space,
        judge: Judge,
        settings: Settings,
        tell: Callable[[Rung], object] = lambda rung: None,
        propose: Proposer | None = None,
        first: Sequence[Prompt] = (),
    ) -> None:
        self.space, self.judge, self.settings, self.tell, self.propose = space, judge, settings, tell, propose
        self._chance = random.Random(f"prompts/{settings.seed}")
        self._first = [DEFAULT, *first]
        self._origin: dict[Prompt, str] = dict.fromkeys(first, "given") | {DEFAULT: "default"}
        self._scores: dict[Prompt, Sequence[float]] = {}
        self._rungs: list[Rung] = []
        # Texts, not prompts: a separator of a prompt without parts to separate is no difference.
        self._texts = {prompt.text(_ANY) for prompt in self._first}

    def run(self) -> Outcome:
        """Search to the end of the rounds or of the budget."""
        ended = "rounds"
        try:
            for number in range(1, self.settings.rounds + 1):
                self._round(number)
        except BudgetSpentError:
            ended = "budget"
        return Outcome(self._furthest(), self._rungs, len(self._scores), ended)

    def _round(self, number: int) -> None:
        alive = self._population(number)
        for rung, items in enumerate(self.settings.rungs, start=1):
            for prompt in alive:
                if len(self._scores.get(prompt, ())) < items:
                    self._scores[prompt] = self.judge.scores(prompt, items)
            ranked = self._rank(alive, items)
            self._rungs.append(Rung(number, rung, items, len(alive), tuple(ranked)))
            self.tell(self._rungs[-1])
            kept = ranked[: -(-len(alive) // self.settings.eta)]
            alive = list(dict.fromkeys([*(standing.prompt for standing in kept), DEFAULT]))

    def _population(self, number: int) -> list[Prompt]:
        """Return the prompts of a round: the given and random ones, later the best so far and edits of them."""
        found = dict.fromkeys(self._first if number == 1 else [DEFAULT])
        if number > 1:
            best = self._parents()
            found.update(dict.fromkeys(best))
            if self.propose is not None:
                for prompt in self.propose(self._held() or self._furthest()):
                    self._origin.setdefault(prompt, "proposed")
                    found[prompt] = None
        attempts = 50 * self.settings.population  # a small space may hold fewer different prompts
        while len(found) < self.settings.population and (attempts := attempts - 1):
            if number == 1 or not best:
                name, prompt = "random", self.space.draw(self._chance)
            else:
                edited = self.space.edit(self._chance.choice(best), self._chance)
                if edited is None:
                    continue
                name, prompt = edited
            text = prompt.text(_ANY)
            if text not in self._texts and prompt not in found:
                self._texts.add(text)
                self._origin.setdefault(prompt, name)
                found[prompt] = None
        return list(found)

    def _parents(self) -> list[Prompt]:
        """Return the best so far that show as many examples as the space allows; half of them some, if there are any.

        Prompts without examples have few neighbours to try. The default may be none of the space's.
        """
        ranked = [standing.prompt for standing in self._held()]
        shown = sorted(
            (prompt for prompt in self._scores if prompt.exemplars and self.space.holds(prompt)),
            key=lambda prompt: (-len(self._scores[prompt]), -sum(self._scores[prompt])),
        )
        half = self.settings.parents // 2
        chosen = [*ranked[: self.settings.parents - half], *shown[:half]]
        return list(dict.fromkeys([*chosen, *ranked]))[: self.settings.parents]

    def _rank(self, prompts: Sequence[Prompt], items: int) -> list[Standing]:
        """Return standings on the first ``items``, best first; of equals the shorter prompt."""
        standings = [
            Standing(prompt, sum(self._scores[prompt][:items]) / items, items, self._origin[prompt])
            for prompt in prompts
        ]
        return sorted(standings, key=lambda standing: (-standing.mean, len(standing.prompt.prefix)))

    def _furthest(self) -> tuple[Standing, ...]:
        """Return the standings of the prompts that the rung of the most items left behind.

        Of a rung that the budget cut short, which has scored some of its prompts and perhaps not the default, the rung
        before counts.
        """
        finished = (rung.items for rung in self._rungs)
        most = max(finished, default=max(map(len, self._scores.values()), default=0))
        return tuple(self._rank([p for p, scores in self._scores.items() if len(scores) >= most], most)) if most else ()

    def _held(self) -> tuple[Standing, ...]:
        """Return those of `_furthest` that show as many examples as the space allows."""
        return tuple(standing for standing in self._furthest() if self.space.holds(standing.prompt))
