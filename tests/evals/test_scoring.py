"""Scores with a shared context read once equal scores of whole requests, and the counts say what was read."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mambacus.evals import scoring
from mambacus.evals.scoring import Counts, Score, Scorer, Tokens


def draw_pairs(seed: int) -> list[tuple[Tokens, Tokens]]:
    """Contexts of one token and more, one to five continuations of one to nine tokens, and some requests twice."""
    chance = random.Random(seed)

    def tokens(length: int) -> Tokens:
        return tuple(chance.randrange(1, 256) for _ in range(length))

    contexts = [tokens(length) for length in (1, 2, 3, 17, 33, 40, 40, 64)]
    pairs = [(context, tokens(chance.randint(1, 9))) for context in contexts for _ in range(chance.choice((1, 2, 5)))]
    pairs += [(contexts[3], (7,)), (contexts[3], (8,)), (contexts[4], (9,))]  # one token: never read
    return [*pairs, *pairs[:4]]


def by_hand(model: Any, context: Tokens, continuation: Tokens) -> Score:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    rows = logits[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return Score(float(rows.gather(1, target[:, None]).sum()), bool((rows.argmax(-1) == target).all()))


def assert_close(found: list[Score], expected: list[Score]) -> None:
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    values = [score.loglikelihood for score in expected]
    assert [score.loglikelihood for score in found] == pytest.approx(values, abs=1e-5, rel=1e-7)


@pytest.mark.parametrize("state_reuse", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_request_alone(checkpoint: Any, batch_size: int, state_reuse: bool) -> None:
    pairs = draw_pairs(0)
    greedy = by_hand_greedy(checkpoint.model, pairs[0][0], 3)
    pairs.append((pairs[0][0], greedy))
    expected = [by_hand(checkpoint.model, *pair) for pair in pairs]
    assert expected[-1].is_greedy and not all(score.is_greedy for score in expected)
    assert_close(Scorer(checkpoint.model, batch_size, state_reuse, Counts()).score(pairs), expected)


def by_hand_greedy(model: Any, context: Tokens, length: int) -> Tokens:
    tokens = list(context)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(context) :])


@pytest.mark.parametrize("state_reuse", [True, False])
def test_reading_in_steps_changes_nothing(checkpoint: Any, state_reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [*draw_pairs(1), ((5,), tuple(range(1, 120))), ((6,), tuple(range(3, 60)))]
    expected = [by_hand(checkpoint.model, *pair) for pair in pairs]
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 5 * 4 * 512 * 4)  # five positions of four rows
    counts = Counts()
    assert_close(Scorer(checkpoint.model, 4, state_reuse, counts).score(pairs), expected)
    assert counts.passes > 20


def test_few_forks_at_once_change_nothing(checkpoint: Any) -> None:
    """On a GPU the memory for states bounds them."""
    pairs = draw_pairs(1)
    whole, parts = Counts(), Counts()
    expected = Scorer(checkpoint.model, 8, True, whole).score(pairs)
    scorer = Scorer(checkpoint.model, 8, True, parts)
    scorer._fork_rows = 2
    assert_close(scorer.score(pairs), expected)
    assert parts.passes > whole.passes and parts.tokens_read == whole.tokens_read


@pytest.mark.parametrize("state_reuse", [True, False])
def test_warming_up_does_every_kind_of_pass_and_counts_nothing(
    checkpoint: Any, state_reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, kinds = Counts(), set()
    scorer = Scorer(checkpoint.model, 4, state_reuse, counts)
    forward = checkpoint.model.forward

    def watched(input_ids: torch.Tensor, **options: Any) -> Any:
        kinds.add((options["seq_idx"] is not None, options["state"] is not None))
        return forward(input_ids, **options)

    monkeypatch.setattr(checkpoint.model, "forward", watched)
    scorer.warm_up()
    assert scorer.counts is counts and counts == Counts()
    assert kinds >= ({(False, False), (True, True)} if state_reuse else {(True, False)})


def test_counts_say_what_was_read_and_saved(checkpoint: Any) -> None:
    context: Tokens = tuple(range(10, 30))
    pairs = [(context, (1, 2, 3)), (context, (4, 5)), (context, (6,)), (context, (6,)), ((9, 9), (1, 2))]
    counts = Counts()
    Scorer(checkpoint.model, 8, True, counts).score(pairs)
    assert counts.requests == 5
    assert counts.tokens_naive == 22 + 21 + 20 + 20 + 3
    assert counts.tokens_read == 20 + 2 + 1 + 3  # the context, two longer continuations, the lone request
    assert counts.as_dict()["tokens_saved"] == counts.tokens_naive - counts.tokens_read
    whole = Counts()
    Scorer(checkpoint.model, 8, False, whole).score(pairs)
    assert whole.tokens_read == whole.tokens_naive == counts.tokens_naive


def test_every_score_is_told_as_it_is_found(checkpoint: Any) -> None:
    pairs = draw_pairs(2)
    for state_reuse in (True, False):
        told: list[tuple[Any, Score]] = []
        steps: list[int] = []

        def done(scores: Any, told: list[Any] = told, steps: list[int] = steps) -> None:
            told.extend(scores.items())
            steps.append(len(scores))

        found = Scorer(checkpoint.model, 2, state_reuse, Counts()).score(pairs, done)
        assert dict(told) == dict(zip(pairs, found, strict=True))
        assert len(steps) > 2


def test_no_requests_and_empty_requests(checkpoint: Any) -> None:
    scorer = Scorer(checkpoint.model, 2, True, Counts())
    assert scorer.score([]) == []
    with pytest.raises(ValueError, match="at least one token"):
        scorer.score([((1,), ())])
    with pytest.raises(ValueError, match="at least one token"):
        scorer.score([((), (1,))])
