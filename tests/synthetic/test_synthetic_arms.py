"""The arms: equal parameters, the counts that torch has, and learners that look nowhere ahead."""

from __future__ import annotations

import pytest
import torch

from mambacus.runtime.errors import UserError
from mambacus.synthetic.arms import TOLERANCE, Arm, Learner, build, size_mamba, size_transformer


def counted(arm: Arm) -> int:
    with torch.device("meta"):
        learner = Learner(arm, 100, 64)
    return sum(p.numel() for p in learner.parameters()) - 100 * arm.width


@pytest.mark.parametrize("parameters", [300_000, 1_000_000, 3_500_000, 12_000_000])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("d_state", [4, 16, 64])
def test_arms_are_equally_large(parameters, layers, d_state):
    transformer = size_transformer(parameters, layers, 16)
    mamba = size_mamba(parameters, 2 * layers, d_state)
    assert abs(transformer.parameters / mamba.parameters - 1) <= 2 * TOLERANCE + 1e-4
    assert transformer.width % 16 == 0
    assert 0.7 < transformer.width / mamba.width < 1.8
    if d_state == 16:
        assert (counted(transformer), counted(mamba)) == (transformer.parameters, mamba.parameters)


def test_sizes_that_cannot_be_met():
    with pytest.raises(UserError, match=r"no width gives 40 Mamba blocks of d_state 16 5,000 parameters within 1%"):
        size_mamba(5_000, 40, 16)
    with pytest.raises(UserError, match="no width gives 2 Transformer layers with heads of 512"):
        size_transformer(100_000, 2, 512)


def test_arms_have_different_keys():
    arms = [size_transformer(60_000, 2, 16), size_mamba(60_000, 4, 8), size_mamba(60_000, 4, 16)]
    assert [arm.key for arm in arms] == ["transformer", "mamba-d8", "mamba-d16"]


@pytest.mark.parametrize("arm", [size_transformer(30_000, 2, 8), size_mamba(30_000, 2, 4)], ids=lambda arm: arm.name)
def test_a_learner_gives_the_models_logits_and_reads_nothing_ahead(arm):
    learner = build(arm, 30, 12, seed=1).eval()
    ids = torch.randint(3, 30, (2, 12))
    places = torch.tensor([[2, 5, 7], [0, 1, 7]])
    logits = learner(ids, places)
    whole = learner.model(ids).logits
    torch.testing.assert_close(logits, whole.gather(1, places[..., None].expand(-1, -1, 30)))
    filled = ids.clone()
    filled[:, 8:] = 0
    torch.testing.assert_close(learner(filled, places), logits)


@pytest.mark.parametrize("arm", [size_transformer(30_000, 2, 8), size_mamba(30_000, 2, 4)], ids=lambda arm: arm.name)
def test_weights_depend_on_the_seed_alone(arm):
    state = torch.get_rng_state()
    first, second, third = (dict(build(arm, 30, 12, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_costs_by_hand():
    mamba = Arm("mamba", layers=2, width=8, parameters=1000, d_state=4)
    assert mamba.flops_per_token(10, 50, 0.5) == 3 * (2000 + 2 * 8 * 50 // 2 + 7 * 2 * 16 * 4)
    assert mamba.memory_numbers(10) == mamba.memory_numbers(99) == 2 * 16 * (4 + 4)
    transformer = Arm("transformer", layers=2, width=8, parameters=1000, mlp_width=20, head_dim=4)
    assert transformer.flops_per_token(10, 50, 0.5) == 3 * (2000 + 2 * 8 * 50 // 2 + 4 * 2 * 8 * 5)
    assert transformer.memory_numbers(10) == 2 * 2 * 8 * 10
