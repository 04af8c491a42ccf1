"""The loop: both arms learn a task small enough for a test, the same rows in the same order."""

from __future__ import annotations

import pytest
import torch

from mambacus.synthetic.arms import build, size_mamba, size_transformer
from mambacus.synthetic.examples import held_out, training_rows
from mambacus.synthetic.tasks import make_task
from mambacus.synthetic.training import CURVE_POINTS, Plan, order_of_rows, score, train


def plan(**changes):
    settings = {
        "steps": 60, "batch": 16, "learning_rate": 1e-2, "seed": 0, "warmup": 0.1, "weight_decay": 0.0, "clip": 1.0,
    }  # fmt: skip
    return Plan(**settings | changes)


def test_every_row_comes_once_before_any_comes_again():
    order = order_of_rows(50, plan(steps=7, batch=16))
    assert len(order) == 7 * 16
    assert sorted(order[:50].tolist()) == sorted(order[50:100].tolist()) == list(range(50))
    assert torch.equal(order, order_of_rows(50, plan(steps=7, batch=16)))
    assert not torch.equal(order, order_of_rows(50, plan(steps=7, batch=16, seed=1)))


@pytest.mark.parametrize("arm", [size_transformer(20_000, 2, 8), size_mamba(20_000, 2, 8)], ids=lambda arm: arm.name)
def test_an_arm_learns_and_the_same_run_is_the_same(arm):
    task = make_task("copy", {"alphabet": 4}, "task")
    rows = training_rows(task, "train", 960, [3], seed=0)
    test = held_out(task, "test", 2, 3, seed=0)
    learners = [build(arm, task.vocab_size, 16, seed=0) for _ in range(2)]
    before = score(learners[0], test)
    outcomes = [train(learner, rows, plan()) for learner in learners]
    assert outcomes[0].curve == outcomes[1].curve
    assert len(outcomes[0].curve) == CURVE_POINTS and outcomes[0].curve[-1][0] == 60
    assert outcomes[0].curve[-1][1] < 0.8 * outcomes[0].curve[0][1]
    after = score(learners[0], test)
    assert after == score(learners[1], test)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["n"] == 2


def test_scores_of_a_model_that_knows():
    task = make_task("copy", {"alphabet": 4}, "task")
    test = held_out(task, "test", 3, 4, seed=0)

    class Knows(torch.nn.Module):
        def forward(self, input_ids, places):
            return 100.0 * torch.nn.functional.one_hot(test.targets.long(), task.vocab_size)

    assert score(Knows(), test) == {"accuracy": 1.0, "token_accuracy": 1.0, "loss": 0.0, "n": 3}
