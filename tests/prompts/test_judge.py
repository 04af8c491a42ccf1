"""Scoring with and without states: the same scores, every token counted; journals replay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mambacus.data import wordproblems
from mambacus.data.prompts import qa_completion
from mambacus.evals.math import grade
from mambacus.evals.scoring import Counts, Scorer
from mambacus.models import MambaState, load
from mambacus.prompts import DEFAULT, Exemplar, Prompt
from mambacus.prompts.journal import Journal
from mambacus.prompts.judge import Pair, PromptJudge
from mambacus.prompts.prompt import encode
from mambacus.prompts.search import BudgetSpentError
from mambacus.runtime.errors import UserError

PROBLEMS = wordproblems.generate(6, "train", seed=9)
POOL = [Exemplar.of(problem) for problem in wordproblems.generate(4, "train", seed=10)]
FEWSHOT = Prompt("Q: {question}\nA:", "Solve it.", exemplars=tuple(POOL))


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load("tiny")


def judge(tiny: tuple[Any, Any], **options: Any) -> PromptJudge:
    def loglikelihoods(model: nn.Module, pairs: Sequence[Pair]) -> list[float]:
        return [score.loglikelihood for score in Scorer(model, 4, False, Counts()).score(pairs)]

    return PromptJudge(
        *tiny, PROBLEMS,
        loglikelihoods=loglikelihoods, grade=lambda problem, text: grade(problem, text, "cot").correct,
        batch_size=4, max_new_tokens=6, **({"score": "loglikelihood"} | options),
    )  # fmt: skip


def test_states_change_no_score_and_every_token_is_counted(tiny: tuple[Any, Any]) -> None:
    with_states, without = judge(tiny), judge(tiny, state_reuse=False)
    for prompt in (DEFAULT, FEWSHOT):
        ours, plain = with_states.scores(prompt, 6), without.scores(prompt, 6)
        assert ours == pytest.approx(plain, abs=1e-4) and all(score < -5 for score in ours)
    tokenizer = tiny[1]
    golds = sum(len(encode(tokenizer, qa_completion(p.solution, p.answer))) - 1 for p in PROBLEMS)
    whole = {
        prompt: sum(len(encode(tokenizer, prompt.text(p.question))) for p in PROBLEMS) for prompt in (DEFAULT, FEWSHOT)
    }
    shared = {prompt: 5 * len(encode(tokenizer, prompt.prefix)) for prompt in (DEFAULT, FEWSHOT)}
    assert without.tokens.read == with_states.tokens.naive == without.tokens.naive == sum(whole.values()) + 2 * golds
    assert with_states.tokens.read == sum(whole.values()) - sum(shared.values()) + 2 * golds
    assert with_states.tokens.unaligned == 0


def test_answers_are_those_of_the_plain_prompt(tiny: tuple[Any, Any]) -> None:
    with_states, without = judge(tiny), judge(tiny, state_reuse=False)
    ours = with_states.answers(FEWSHOT, 6)
    assert ours == without.answers(FEWSHOT, 6) and any(answer.completion for answer in ours)
    assert with_states.tokens.generated == sum(answer.tokens for answer in ours) == without.tokens.generated
    before = with_states.tokens.forward
    assert with_states.answers(FEWSHOT, 6) == ours and with_states.tokens.forward == before


def test_accuracy_is_the_share_of_right_answers(tiny: tuple[Any, Any]) -> None:
    by_accuracy = judge(tiny, score="accuracy")
    by_accuracy._grade = lambda problem, text: problem is PROBLEMS[1]
    assert by_accuracy.scores(FEWSHOT, 2) == [0.0, 1.0] and by_accuracy.scores(FEWSHOT, 3) == [0.0, 1.0, 0.0]
    with pytest.raises(BudgetSpentError):
        judge(tiny, score="accuracy", budget=by_accuracy.tokens.forward - 1).scores(FEWSHOT, 3)


def test_prompts_that_begin_alike_share_the_reading(tiny: tuple[Any, Any]) -> None:
    one = judge(tiny)
    one.scores(FEWSHOT, 2)
    before = one.tokens.read
    longer = Prompt(FEWSHOT.question, FEWSHOT.instruction, exemplars=(*POOL[:3], POOL[0]))
    alone = judge(tiny)
    assert one.scores(longer, 2) == pytest.approx(alone.scores(longer, 2), abs=1e-4)
    three = Prompt(FEWSHOT.question, FEWSHOT.instruction, exemplars=tuple(POOL[:3]))
    saved = len(encode(tiny[1], three.beginnings[-2]))
    assert saved > 100 and one.tokens.read - before == alone.tokens.read - saved


def test_a_survivor_pays_for_new_items_alone(tiny: tuple[Any, Any]) -> None:
    steps, whole = judge(tiny), judge(tiny)
    assert steps.scores(FEWSHOT, 2) == pytest.approx(whole.scores(FEWSHOT, 6)[:2], abs=1e-4)
    assert steps.scores(FEWSHOT, 6) == pytest.approx(whole.scores(FEWSHOT, 6), abs=1e-4)
    assert steps.tokens.read == whole.tokens.read


def test_few_bytes_of_states_cost_tokens_and_no_score(tiny: tuple[Any, Any]) -> None:
    roomy, tight = judge(tiny), judge(tiny, state_bytes=1)
    for first in (2, 6):
        assert tight.scores(FEWSHOT, first) == pytest.approx(roomy.scores(FEWSHOT, first), abs=1e-4)
    other = Prompt("Q: {question}\nA:", "Solve.")
    tight.scores(other, 1)
    assert len(tight._states._states) == 1


def test_states_after_whole_prefixes_outlive_those_after_parts(tiny: tuple[Any, Any]) -> None:
    size = MambaState.zeros(tiny[0].config).nbytes
    kept = judge(tiny, state_bytes=6 * size)  # the instruction, three beginnings with examples, and the whole prefix
    kept.scores(FEWSHOT, 2)
    kept.scores(Prompt("Q: {question}\nA:", "Work it out.", exemplars=tuple(POOL)), 2)
    before = kept.tokens.read
    kept.scores(FEWSHOT, 3)
    query = encode(tiny[1], FEWSHOT.query(PROBLEMS[2].question))
    gold = encode(tiny[1], qa_completion(PROBLEMS[2].solution, PROBLEMS[2].answer))
    assert kept.tokens.read - before == len(query) + len(gold) - 1


def test_likelihoods_are_measured_by_any_score(tiny: tuple[Any, Any]) -> None:
    by_accuracy, by_likelihood = judge(tiny, score="accuracy"), judge(tiny)
    assert by_accuracy.likelihoods(FEWSHOT, 2) == by_likelihood.scores(FEWSHOT, 2)
    assert by_accuracy.scores(FEWSHOT, 2) != by_likelihood.scores(FEWSHOT, 2) == by_likelihood.likelihoods(FEWSHOT, 2)


def test_the_budget_bounds_what_is_read(tiny: tuple[Any, Any]) -> None:
    free = judge(tiny)
    free.scores(FEWSHOT, 4)
    with pytest.raises(BudgetSpentError):
        judge(tiny, budget=free.tokens.read - 1).scores(FEWSHOT, 4)
    exact = judge(tiny, budget=free.tokens.read + 4)  # the bound counts each gold's last token too
    exact.scores(FEWSHOT, 4)
    with pytest.raises(BudgetSpentError):
        exact.scores(FEWSHOT, 5)


def test_a_journal_replays_scores_answers_and_counts(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = judge(tiny, journal=Journal(path, {"seed": 1}, resume=False))
    scores, answers = first.scores(FEWSHOT, 4), first.answers(DEFAULT, 2)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "cut off by a ki')
    journal = Journal(path, {"seed": 1}, resume=True)
    again = judge((tiny[0], tiny[1]), journal=journal)
    assert again.scores(FEWSHOT, 4) == scores and again.answers(DEFAULT, 2) == answers
    assert again.tokens == first.tokens and journal.replayed == 2
    assert again.scores(FEWSHOT, 6)[:4] == scores  # and it goes on
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 and rows[0] == {"identity": {"seed": 1}}


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"seed": 1, "bench": "a"}, resume=False)
    with pytest.raises(UserError, match=r"holds another search \(differs in seed\)"):
        Journal(tmp_path / "j", {"seed": 2, "bench": "a"}, resume=True)
    with pytest.raises(UserError, match="add --resume to continue it"):
        Journal(tmp_path / "j", {"seed": 1, "bench": "a"}, resume=False)


def test_a_journal_holds_texts_with_other_line_ends(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {}, resume=False)
    journal.add("a", {"values": ["one\x85two\u2028three\u2029four\x0bfive\r"]})
    journal.add("b", {"values": []})
    again = Journal(tmp_path / "j", {}, resume=True)
    assert again.find("a") == journal.find("a") and again.find("b") == {"key": "b", "values": []}


def test_a_line_without_a_key_is_named(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {}, resume=False)
    with open(tmp_path / "j", "a", encoding="utf-8") as file:
        file.write('{"values": [1]}\n')
    with pytest.raises(UserError, match=r"j, line 2: expected a measurement with a key, got \{'values': \[1\]\}"):
        Journal(tmp_path / "j", {}, resume=True)


def test_a_resumed_run_counts_no_prefix_twice(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    other = Prompt("Q: {question}\nA:", "Solve it.", exemplars=tuple(POOL[:3]))
    for state_bytes in (2**28, 1):
        path = tmp_path / str(state_bytes)
        whole = judge(tiny, journal=Journal(path, {}, resume=False), state_bytes=state_bytes)
        whole.scores(FEWSHOT, 2)
        after_first = path.read_bytes()
        found = whole.scores(other, 2), whole.scores(FEWSHOT, 4), whole.answers(FEWSHOT, 2)
        path.write_bytes(after_first)
        again = judge(tiny, journal=Journal(path, {}, resume=True), state_bytes=state_bytes)
        again.scores(FEWSHOT, 2)
        ours = again.scores(other, 2), again.scores(FEWSHOT, 4), again.answers(FEWSHOT, 2)
        assert again.tokens == whole.tokens
        assert ours[0] == pytest.approx(found[0], abs=1e-4) and ours[1] == pytest.approx(found[1], abs=1e-4)
        assert ours[2] == found[2]


def test_the_budget_bounds_what_is_read_where_the_tokenizer_joins(tiny: tuple[Any, Any]) -> None:
    joined = Prompt("Solve: wo{question}\nA:", exemplars=tuple(POOL))
    free = judge(tiny)
    free.problems = [dataclasses.replace(problem, question=f"rd {problem.question}") for problem in PROBLEMS]
    free.scores(joined, 3)
    assert free.tokens.unaligned == 3 and free.tokens.read == free.tokens.naive
    bound = judge(tiny, budget=free.tokens.read - 1)
    bound.problems = free.problems
    with pytest.raises(BudgetSpentError):
        bound.scores(joined, 3)
    assert bound.tokens.forward == 0
