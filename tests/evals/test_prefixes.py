"""The trie of shared beginnings: what is kept, that every sequence goes on from its own tokens, and the budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambacus.evals.prefixes import Prefix, Tokens, levels, shared_prefixes, walk
from mambacus.evals.scoring import Counts, Scorer
from mambacus.models import MambaConfig, MambaState

CONFIG = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
ROW = MambaState.zeros(CONFIG).nbytes

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=9).map(tuple), max_size=14)


class Reader:
    """Reads segments into states that hold the hash of what was read, and counts the rows held."""

    def __init__(self) -> None:
        self.tokens_read = 0
        self.sizes: list[int] = []
        self.texts: dict[int, Tokens] = {0: ()}

    def __call__(self, segments: Sequence[Tokens], state: MambaState | None) -> MambaState:
        assert segments and all(segments)
        self.tokens_read += sum(map(len, segments))
        self.sizes.append(len(segments))
        before = [0] * len(segments) if state is None else state.tokens.tolist()
        numbers = []
        for segment, number in zip(segments, before, strict=True):
            numbers.append(len(self.texts))
            self.texts[numbers[-1]] = self.texts[number] + segment
        empty = MambaState.zeros(CONFIG, len(segments))
        return MambaState(empty.conv_state, empty.ssm_state, torch.tensor(numbers))


def nodes(root: Prefix) -> list[Prefix]:
    return [root, *(node for child in root.children for node in nodes(child))]


def test_two_tasks_with_worked_examples() -> None:
    first, second = tuple(range(100, 180)), tuple(range(200, 290))
    sequences = [(*first, 1, 2), (*second, 1), (*first, 3), (*second, 9, 9), (*first, 3, 4), (5,), ()]
    root = shared_prefixes(sequences, 64)
    assert {child.tokens for child in root.children} == {first, second}
    assert {child.tokens: child.members for child in root.children} == {first: [0, 2, 4], second: [1, 3]}
    assert root.members == [5, 6]


def test_what_saves_too_little_is_not_kept() -> None:
    sequences = [(7, 8, 9, last) for last in range(5)]  # saves 3 * 4 tokens
    assert shared_prefixes(sequences, 13).children == []
    assert [child.tokens for child in shared_prefixes(sequences, 12).children] == [(7, 8, 9)]


def test_a_long_chain_needs_no_recursion() -> None:
    sequences = [(1,) * length for length in range(1, 3000, 2)]
    assert levels(shared_prefixes(sequences, 2)) > 1000


@given(SEQUENCES, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_sequence_goes_on_from_its_own_beginning(sequences: list[Tokens], least: int, rows: int) -> None:
    root = shared_prefixes(sequences, least)
    assert sorted(member for node in nodes(root) for member in node.members) == list(range(len(sequences)))
    reader = Reader()
    seen = []
    for fork in walk(root, reader, ROW, rows * ROW):
        for member, depth, row in zip(fork.members, fork.depths, fork.rows, strict=True):
            text = () if fork.state is None else reader.texts[int(fork.state.tokens[row])]
            assert text == sequences[member][:depth] and len(text) == depth
            seen.append(member)
    assert sorted(seen) == list(range(len(sequences)))
    assert max(reader.sizes, default=0) * levels(root) <= max(rows, levels(root))
    kept = [node for node in nodes(root) if node is not root]
    assert reader.tokens_read == sum(child.depth - node.depth for node in nodes(root) for child in node.children)
    assert all(len(node.members) + len(node.children) > 1 for node in kept)


def few_shot_pairs(seed: int) -> list[tuple[Tokens, Tokens]]:
    """Two sets of worked examples, eight questions behind each, one to three choices of one to six tokens."""
    chance = random.Random(seed)

    def tokens(length: int) -> Tokens:
        return tuple(chance.randrange(1, 256) for _ in range(length))

    pairs = []
    for examples in (tokens(70), tokens(45)):
        topics = [examples, examples + tokens(30)]  # a beginning within a beginning
        for _ in range(8):
            context = chance.choice(topics) + tokens(chance.randint(1, 12))
            pairs += [(context, tokens(chance.randint(1, 6))) for _ in range(chance.choice((1, 3)))]
        pairs.append((topics[1], tokens(3)))  # the beginning itself is a context
    return pairs


@pytest.mark.parametrize("budget", [1, 2**30])
def test_scores_do_not_depend_on_sharing(checkpoint: Any, budget: int) -> None:
    pairs = few_shot_pairs(0)
    whole, counts = Counts(), Counts()
    expected = Scorer(checkpoint.model, 4, False, whole).score(pairs)
    found = Scorer(checkpoint.model, 4, True, counts, state_bytes=budget).score(pairs)
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert [score.loglikelihood for score in found] == pytest.approx(
        [score.loglikelihood for score in expected], abs=1e-5, rel=1e-7
    )
    assert counts.prefixes >= 2
    assert counts.tokens_naive == whole.tokens_read > 3 * counts.tokens_read
