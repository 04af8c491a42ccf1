"""The loop: both arms learn a task small enough for a test, the same rows in the same order."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambacus.synthetic import training
from mambacus.synthetic.arms import build, size_mamba, size_transformer
from mambacus.synthetic.examples import held_out, training_sets
from mambacus.synthetic.tasks import make_task
from mambacus.synthetic.training import CURVE_POINTS, Plan, Steps, order_of_rows, score, train


def plan(**changes):
    settings = {
        "steps": 60, "tokens": 128, "learning_rate": 1e-2, "seed": 0, "warmup": 0.1, "weight_decay": 0.0, "clip": 1.0,
    }  # fmt: skip
    return Plan(**settings | changes)


def test_every_row_comes_once_before_any_comes_again():
    order = order_of_rows(50, 7 * 16, seed=0)
    assert len(order) == 7 * 16
    assert sorted(order[:50].tolist()) == sorted(order[50:100].tolist()) == list(range(50))
    assert torch.equal(order, order_of_rows(50, 7 * 16, seed=0))
    assert not torch.equal(order, order_of_rows(50, 7 * 16, seed=1))


def test_steps_have_equal_tokens_and_sets_take_turns():
    arm = size_transformer(20_000, 1, 8)
    task = make_task("copy", {"alphabet": 4}, "task")
    sets = training_sets(task, [40, 40, 40], [3, 7, 30], seed=0)
    lengths = [rows.input_ids.shape[1] for rows in sets]
    steps = Steps(build(arm, task.vocab_size, 70, seed=0), sets, plan(steps=7, tokens=64))
    assert steps.batches == [64 // lengths[0], 64 // lengths[1], 1]
    assert sorted(steps.schedule[:3]) == sorted(steps.schedule[3:6]) == [0, 1, 2]
    outcome = train(build(arm, task.vocab_size, 70, seed=0), sets, plan(steps=7, tokens=64), None)
    assert outcome.tokens == sum(steps.batches[place] * lengths[place] for place in steps.schedule)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations with their arguments as they were, results at fixed addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A recorder whose recordings leave all memory as it was, as a graph's do."""

    def __init__(self, memory) -> None:
        self.memory = memory
        self.warmed = self.recorded = 0

    def warm_up(self, run) -> None:
        self.warmed += 1
        run()

    def record(self, run):
        self.recorded += 1
        memory = self.memory()
        before = [tensor.detach().clone() for tensor in memory]
        with Tape() as tape:
            loss = run()
        with torch.no_grad():
            for tensor, was in zip(memory, before, strict=True):
                tensor.copy_(was)
        return tape.replay, loss


def test_recorded_steps_are_the_steps(monkeypatch):
    """Nothing that changes from step to step is fixed by the recording: rows, rates, weights, moments, losses."""
    adamw = torch.optim.AdamW  # as on a GPU, where the rate is read by the kernel
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **options: adamw(*given, **options | {"fused": True}))
    arm = size_transformer(20_000, 1, 8)
    task = make_task("copy", {"alphabet": 4}, "task")
    sets = training_sets(task, [40, 40], [3, 7], seed=0)
    learners = [build(arm, task.vocab_size, 16, seed=0) for _ in range(2)]
    plain = train(learners[0], sets, plan(steps=20), None)
    made = []
    monkeypatch.setattr(training, "Steps", lambda *given: made.append(Steps(*given)) or made[-1])

    def memory():
        (steps,) = made
        optimizer = steps._optimizer
        moments = [value for state in optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in optimizer.param_groups]
        return [*learners[1].parameters(), *moments, *rates, steps.losses, steps._taken, *steps._taken_of]

    recorder = TapeRecorder(memory)
    recorded = train(learners[1], sets, plan(steps=20), recorder)
    assert (recorder.warmed, recorder.recorded) == (2, 2)
    assert recorded.curve == plain.curve and recorded.tokens == plain.tokens
    for one, other in zip(learners[0].parameters(), learners[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arm", [size_transformer(20_000, 2, 8), size_mamba(20_000, 2, 8)], ids=lambda arm: arm.name)
def test_an_arm_learns_and_the_same_run_is_the_same(arm):
    task = make_task("copy", {"alphabet": 4}, "task")
    sets = training_sets(task, [480, 480], [2, 3], seed=0)
    test = held_out(task, "test", 2, 3, seed=0)
    learners = [build(arm, task.vocab_size, 16, seed=0) for _ in range(2)]
    before = score(learners[0], test)
    outcomes = [train(learner, sets, plan(), None) for learner in learners]
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
