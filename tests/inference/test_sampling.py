"""Choosing tokens: each filter against its definition and against transformers'."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from mambacus.inference import SamplingParams
from mambacus.inference.sampling import choose_tokens, generator_for
from mambacus.runtime.errors import UserError


def logits(rows: int = 3, vocabulary: int = 23, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def frequencies(row: torch.Tensor, params: SamplingParams, draws: torch.Tensor) -> torch.Tensor:
    """Return how often each token is drawn."""
    tokens = choose_tokens(row.expand(len(draws), -1), params, draws)
    return torch.bincount(tokens, minlength=len(row))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 1000},
        {"top_p": 1e-6},
    ],
)
def test_the_distribution_is_that_of_transformers(changes: dict) -> None:
    from transformers.generation import logits_process as theirs

    params = SamplingParams(**{"temperature": 1.0, **changes})
    row = logits(1)
    expected = theirs.TemperatureLogitsWarper(params.temperature)(None, row)
    if params.top_k:
        expected = theirs.TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = theirs.TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = theirs.MinPLogitsWarper(params.min_p)(None, expected)
    expected = torch.softmax(expected, -1)[0]
    # as a completion draws, and equally spaced, which a weak hash would not survive
    for draws in (
        torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.arange(100_000, dtype=torch.float64) / 100_000,
    ):
        got = frequencies(row[0], params, draws)
        assert (got[expected == 0] == 0).all()  # nothing excluded is ever drawn
        likely = expected * len(draws) >= 5
        if likely.sum() > 1:
            share = expected[likely].double() / expected[likely].double().sum()
            assert chisquare(got[likely], share * got[likely].sum()).pvalue > 1e-4


def test_rounding_changes_no_draw() -> None:
    """Logits of a model in another batch differ by some 1e-6, which a look-up in the cumulative sum would show."""
    rows = logits(500, 5_000)
    draws = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = rows + 3e-6 * logits(500, 5_000, seed=1)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.95)):
        assert torch.equal(choose_tokens(rows, params, draws), choose_tokens(other, params, draws))


def test_neighbouring_draws_and_tokens_are_independent() -> None:
    """Consecutive seeds and token ids give noise without correlation, of the Gumbel distribution."""
    from mambacus.inference.sampling import _noise

    noise = _noise(torch.arange(300, dtype=torch.float64) / 2**32, torch.arange(1_000)).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.01)
    centred = (noise - noise.mean()) / noise.std()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[1:, 1:] * centred[:-1, :-1]):
        assert abs(shifted.mean().item()) < 0.01


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    scores, ids = logits(2), torch.tensor([[3, 5, 3], [0, 1, 2]])
    penalised = RepetitionPenaltyLogitsProcessor(1.8)(ids, scores.clone())
    seen = torch.zeros(2, 23, dtype=torch.bool).scatter_(1, ids, True)
    params = SamplingParams(repetition_penalty=1.8)
    assert torch.equal(choose_tokens(scores, params, None, seen), penalised.argmax(-1))
    likeliest = scores.argmax(-1)
    only_that = torch.zeros(2, 23, dtype=torch.bool).scatter_(1, likeliest[:, None], True)
    strong = SamplingParams(repetition_penalty=100.0)
    assert (choose_tokens(scores, strong, None, only_that) != likeliest).all()


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert choose_tokens(logits(), SamplingParams(), None).tolist() == logits().argmax(-1).tolist()
    assert choose_tokens(torch.zeros(2, 5), SamplingParams(), None).tolist() == [0, 0]


def test_a_row_draws_the_same_in_any_batch() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9)
    draws = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = choose_tokens(logits(), params, draws).tolist()
    alone = [choose_tokens(logits()[i : i + 1], params, draws[i : i + 1]).item() for i in range(3)]
    assert together == alone


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.99)):
        assert choose_tokens(row, params, number(0.0)).item() in (1, 3)
        assert choose_tokens(row, params, number(1 - 2**-53)).item() in (1, 3)
        assert choose_tokens(torch.full((1, 5), -torch.inf), params, number(0.5)).item() == -1


def test_generators_differ_by_seed_prompt_and_sample_only() -> None:
    first = generator_for(0, [1, 2], 0).random()
    assert generator_for(0, [1, 2], 0).random() == first
    others = [generator_for(*args).random() for args in ((1, [1, 2], 0), (0, [1, 3], 0), (0, [1, 2], 1), (0, [12], 0))]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nan_gets_no_token_and_the_others_do(temperature: float) -> None:
    rows = torch.tensor([[0.0, torch.nan], [-torch.inf, 0.0]])
    draws = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert choose_tokens(rows, SamplingParams(temperature=temperature), draws).tolist() == [-1, 1]


def test_logit_bias_is_added_first() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    assert choose_tokens(rows, SamplingParams(logit_bias={1: 4.5}), None).tolist() == [1, 0]
    never = SamplingParams(logit_bias={0: -100, 2: -100}, temperature=1.0)
    assert set(choose_tokens(rows[:1].expand(50, -1), never, torch.linspace(0.01, 0.99, 50).double()).tolist()) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"n": 0}, {"stop": ["a", ""]},
        {"logit_bias": {3: float("inf")}}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
        SamplingParams(**wrong)


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
