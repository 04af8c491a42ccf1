"""Successive halving against a judge whose scores are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mambacus.prompts import DEFAULT, Exemplar, Prompt
from mambacus.prompts.choice import Solved, choose, paired
from mambacus.prompts.search import BudgetSpentError, Rung, Search, Settings, Standing
from mambacus.prompts.space import Space, load_space

POOL = tuple(Exemplar(f"{n}?", f" #### {n}") for n in range(10))
SETTINGS = Settings(population=16, rounds=4, first=2, items=16)


class Known:
    """Likes example 7 first and as many examples as there may be; counts the items it scores."""

    def __init__(self, budget: int = 10**9) -> None:
        self.budget = budget
        self.scored: dict[Prompt, int] = {}

    def scores(self, prompt: Prompt, items: int) -> Sequence[float]:
        if sum(self.scored.values()) + items - self.scored.get(prompt, 0) > self.budget:
            raise BudgetSpentError
        self.scored[prompt] = items
        likes = len(prompt.exemplars) + 20 * (prompt.exemplars[:1] == POOL[7:8])
        return [likes + (item % 3) * 0.1 for item in range(items)]


def space() -> Space:
    return load_space(None, POOL)


def test_the_best_is_found_by_edits_of_the_best() -> None:
    outcome = Search(space(), Known(), dataclasses.replace(SETTINGS, rounds=10)).run()
    best = outcome.standings[0]
    assert best.prompt.exemplars[0] == POOL[7] and len(best.prompt.exemplars) >= 6
    first_round = [rung for rung in outcome.rungs if rung.round == 1]
    assert best.mean > first_round[-1].standings[0].mean and outcome.ended == "rounds"


def test_rungs_halve_prompts_and_double_items_and_keep_the_default() -> None:
    told: list[Rung] = []
    judge = Known()
    outcome = Search(space(), judge, SETTINGS, told.append).run()
    first = [rung for rung in told if rung.round == 1]
    assert [rung.items for rung in first] == SETTINGS.rungs == [2, 4, 8, 16]
    assert [rung.prompts for rung in first] == [16, 9, 6, 4]  # half of them, and the default
    assert all(any(s.prompt == DEFAULT for s in rung.standings) for rung in told)
    assert any(s.prompt == DEFAULT and s.origin == "default" for s in outcome.standings)
    assert told == outcome.rungs and outcome.tried == len(judge.scored)
    means = [standing.mean for standing in outcome.standings]
    assert means == sorted(means, reverse=True)


def test_prompts_of_the_same_text_are_tried_once() -> None:
    judge = Known()
    Search(space(), judge, SETTINGS).run()
    texts = [prompt.text("?") for prompt in judge.scored]
    assert len(texts) == len(set(texts))


def test_a_seed_decides_everything() -> None:
    runs = [Search(space(), Known(), Settings(16, 3, 2, 8, seed=seed)).run().standings for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_budget_is_never_exceeded() -> None:
    for budget in (0, 2, 31, 60, 100):
        judge = Known(budget)
        outcome = Search(space(), judge, SETTINGS).run()
        assert sum(judge.scored.values()) <= budget and outcome.ended == "budget"
        assert bool(outcome.standings) == (budget >= 2)


def test_a_rung_that_the_budget_cut_short_drops_no_prompt() -> None:
    whole = Known()
    Search(space(), whole, dataclasses.replace(SETTINGS, rounds=1)).run()
    first = 16 * 2
    for budget in (first + 2, first + 5, first + 9 * 2 + 4):  # one, two prompts of the second rung; one of the third
        outcome = Search(space(), Known(budget), SETTINGS).run()
        last = outcome.rungs[-1]
        assert outcome.ended == "budget" and set(outcome.standings) >= set(last.standings)
        assert any(standing.prompt == DEFAULT for standing in outcome.standings)
        assert {standing.items for standing in outcome.standings} == {last.items}


def test_proposals_join_the_next_round() -> None:
    mine = Prompt(instruction="Proposed.", exemplars=POOL[7:8])

    def propose(standings: Sequence[Standing]) -> list[Prompt]:
        assert standings[0].mean >= standings[-1].mean
        return [mine]

    judge = Known()
    outcome = Search(space(), judge, Settings(8, 2, 2, 4), propose=propose).run()
    assert judge.scored[mine] and any(s.origin == "proposed" for r in outcome.rungs for s in r.standings)


def test_given_prompts_meet_the_default_in_the_first_round() -> None:
    mine = Prompt(exemplars=POOL[:8])
    outcome = Search(space(), Known(), Settings(8, 2, 2, 4), first=[mine]).run()
    first, second = (next(r for r in outcome.rungs if (r.round, r.rung) == (n, 1)) for n in (1, 2))
    assert [s.origin for s in first.standings if s.prompt in (mine, DEFAULT)] == ["given", "default"]
    assert first.prompts == 8 and sum(s.origin == "random" for s in first.standings) == 6
    assert sum(s.origin == "default" for s in second.standings) == 1


def test_likelier_answers_decide_where_as_many_are_right() -> None:
    likely = (-3.0, -5.0, -4.0, -4.0)
    default = Solved(DEFAULT, [True, False, False, False], likely)
    fewer = Solved(Prompt(instruction="a"), [False] * 4, [value + 3 for value in likely])
    likelier = Solved(Prompt(instruction="b"), [False, True, False, False], [value + 2 for value in likely])
    little = Solved(Prompt(instruction="c"), default.correct, [-2.0, -6.0, -4.1, -3.8])
    found, reason = choose(default, [fewer, little, likelier])
    assert found is likelier and "likelier by 2.00 nats" in reason
    assert choose(default, [fewer, little])[0] is default
    blind = [dataclasses.replace(one, likelihoods=()) for one in (default, likelier)]
    assert choose(blind[0], blind[1:])[0] is blind[0]


def test_a_winner_must_be_clear() -> None:
    default = Solved(DEFAULT, [True, False, False, False] * 4)
    other, longer = Prompt(instruction="x"), Prompt(instruction="longer")
    better = Solved(other, [True, True, False, False] * 4)
    assert choose(default, [better])[0] is better
    assert choose(default, [Solved(longer, better.correct), better])[0] is better
    little = Solved(other, [True, False, False, False] * 3 + [True, True, False, False])
    for loser in (little, Solved(other, [False] * 16), Solved(other, default.correct)):
        found, reason = choose(default, [loser])
        assert found is default and reason.startswith("the default prompt was kept")
    assert choose(default, [])[0] is choose(default, [default])[0] is default


def test_half_of_the_parents_show_examples() -> None:
    class Terse(Known):
        def scores(self, prompt: Prompt, items: int) -> Sequence[float]:
            super().scores(prompt, items)
            return [float(-len(prompt.prefix))] * items

    search = Search(space(), Terse(), SETTINGS)
    search.run()
    parents = search._parents()
    assert len(parents) == 4 and sum(bool(parent.exemplars) for parent in parents) == 2
    assert parents[0] == search.run().standings[0].prompt


def test_paired_counts_what_changed() -> None:
    found = paired([True] * 5 + [False] * 15, [False] + [True] * 14 + [False] * 5)
    assert (found["gained"], found["lost"]) == (10, 1) and abs(found["difference"] - 0.45) < 1e-12
    assert found["low"] < 0.45 < found["high"] and 0.01 < found["p"] < 0.012
