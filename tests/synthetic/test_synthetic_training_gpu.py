"""Training from CUDA graphs equals training without: ``pytest -m gpu tests/synthetic``."""

from __future__ import annotations

import pytest
import torch

from mambacus.runtime.graphs import CudaRecorder
from mambacus.synthetic.arms import build, size_mamba, size_transformer
from mambacus.synthetic.examples import training_sets
from mambacus.synthetic.tasks import make_task
from mambacus.synthetic.training import Plan, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("arm", [size_transformer(60_000, 2, 16), size_mamba(60_000, 4, 16)], ids=lambda arm: arm.name)
def test_graphs_train_what_steps_train(arm):
    """The losses of 20 steps, and the weights, within what bfloat16 and sums in another order leave open."""
    device = torch.device("cuda")
    task = make_task("mqar", {"keys": 16, "values": 16}, "task")
    sets = tuple(rows.to(device) for rows in training_sets(task, [256] * 3, [2, 5, 12], seed=0))
    plan = Plan(
        steps=20, tokens=512, learning_rate=3e-3, seed=0, warmup=0.1, weight_decay=0.1, clip=1.0,
    )  # fmt: skip
    learners = [build(arm, task.vocab_size, 64, seed=0) for _ in range(2)]
    plain, recorded = (train(*given) for given in zip(learners, [sets] * 2, [plan] * 2,
                                                      [None, CudaRecorder(device)], strict=True))  # fmt: skip
    assert [step for step, _ in plain.curve] == [*range(1, 21)]
    for (step, one), (_, other) in zip(plain.curve, recorded.curve, strict=True):
        assert other == pytest.approx(one, rel=5e-3), step
    assert recorded.curve[-1][1] < recorded.curve[0][1]
    assert recorded.tokens == plain.tokens
    for one, other in zip(learners[0].parameters(), learners[1].parameters(), strict=True):
        moved = (one - other).norm() / one.norm()
        assert moved < 0.05
