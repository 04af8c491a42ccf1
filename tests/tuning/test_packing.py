"""Packing: every sample once, rows nearly equal, an order of the seed; packed = separate in loss and gradients."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambacus.models import MambaLM
from mambacus.tuning.data import IGNORED, Sample
from mambacus.tuning.packing import PADDING, PlannedBatches, collate, pack, plan


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400), st.integers(1, 8))
def test_rows_hold_every_sample_once_and_stay_within_capacity(lengths: list[int], capacity: int, min_rows: int) -> None:
    rows = pack(lengths, capacity, min_rows=min_rows)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(rows)
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows if len(row) > 1)
    assert len(rows) >= min(min_rows, len(lengths))
    assert rows == pack(lengths, capacity, min_rows=min_rows)


def test_without_capacity_each_sample_has_its_row() -> None:
    assert sorted(pack([5, 9, 7], 0)) == [[0], [1], [2]]


def test_little_padding_is_computed() -> None:
    drawn = random.Random(0)
    lengths = [min(1024, int(drawn.lognormvariate(4.8, 0.5)) + 20) for _ in range(2000)]
    packed = plan(lengths, epochs=1, batch_size=32, grad_accum=1, capacity=1024, seed=0)
    loose = plan(lengths, epochs=1, batch_size=32, grad_accum=1, capacity=0, seed=0)
    assert packed.tokens == loose.tokens == sum(lengths)
    assert packed.efficiency >= 0.99
    assert loose.efficiency < 0.6


def chosen(lengths: list[int], **settings: int) -> list[list[int]]:
    """Return the samples of each micro-batch."""
    defaults = {"epochs": 1, "batch_size": 4, "grad_accum": 1, "capacity": 20, "seed": 0}
    parts = plan(lengths, **(defaults | settings)).micro_batches  # type: ignore[arg-type]
    return [sorted(index for row in part for index in row) for part in parts]


def test_an_epoch_holds_every_sample_once_in_an_order_of_the_seed() -> None:
    lengths = [3, 5, 8, 2, 9, 4, 7, 6, 5, 5]
    first = chosen(lengths)
    assert sorted(index for part in first for index in part) == list(range(10))
    assert [len(part) for part in first] == [4, 4, 2]
    assert first == chosen(lengths)
    assert first != chosen(lengths, seed=1)


def test_epochs_are_shuffled_anew_and_flow_into_each_other() -> None:
    parts = chosen([1] * 6, epochs=2)
    assert [len(part) for part in parts] == [4, 4, 4]
    stream = [index for part in parts for index in part]
    assert sorted(stream) == sorted([*range(6)] * 2)


def test_max_steps_overrides_epochs() -> None:
    assert [len(part) for part in chosen([1] * 6, max_steps=5)] == [4] * 5
    assert plan([1] * 6, epochs=9, max_steps=5, batch_size=4, grad_accum=1, capacity=9, seed=0).steps == 5


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_splitting_a_step_keeps_its_samples(parts: int) -> None:
    lengths = [3, 5, 8, 2, 9, 4, 7, 6, 5, 5]
    whole, split = chosen(lengths), chosen(lengths, grad_accum=parts)
    assert len(split) == 2 * parts + 2  # the last step has two samples, so two parts
    assert sorted(index for part in split[:parts] for index in part) == whole[0]


def test_tensors_of_a_row(samples: list[Sample]) -> None:
    a, b, c = samples[:3]
    batch = collate([[a, b], [c]])
    ids, labels, seq_idx = batch["input_ids"], batch["labels"], batch["seq_idx"]
    assert ids.shape == labels.shape == seq_idx.shape == (2, len(a) + len(b))
    assert (ids.dtype, labels.dtype, seq_idx.dtype) == (torch.int64, torch.int64, torch.int32)
    assert seq_idx[0].tolist() == [0] * len(a) + [1] * len(b)
    assert seq_idx[1].tolist() == [0] * len(c) + [PADDING] * (len(a) + len(b) - len(c))
    assert ids[0].tolist() == [*a.ids, *b.ids]
    assert labels[0].tolist() == [*a.labels, *b.labels]
    assert (labels[1, len(c) :] == IGNORED).all()


def test_a_planned_batch_is_the_collated_samples(samples: list[Sample]) -> None:
    layout = plan([*map(len, samples)], epochs=1, batch_size=4, grad_accum=1, capacity=64, seed=0)
    data = PlannedBatches(samples, layout)
    assert len(data) == 2
    first = [[samples[index] for index in row] for row in layout.micro_batches[0]]
    assert torch.equal(data[0]["input_ids"], collate(first)["input_ids"])


def test_packed_equals_separate_in_loss_and_every_gradient(
    make_model: Callable[..., MambaLM], samples: list[Sample]
) -> None:
    tokens = sum(int((torch.from_numpy(sample.labels) != IGNORED).sum()) for sample in samples)

    def loss_and_gradients(rows: list[list[Sample]]) -> tuple[float, dict[str, torch.Tensor]]:
        model = make_model()
        total = 0.0
        for batch in [collate(rows)] if len(rows) < len(samples) else [collate([row]) for row in rows]:
            loss = model(**batch, num_items_in_batch=tokens, loss_only=True).loss
            loss.backward()
            total += loss.item()
        return total, {name: parameter.grad for name, parameter in model.named_parameters()}

    packed_rows = [[samples[index] for index in row] for row in pack([*map(len, samples)], 80)]
    assert 1 < len(packed_rows) < len(samples)
    separate, expected = loss_and_gradients([[sample] for sample in samples])
    packed, gradients = loss_and_gradients(packed_rows)
    assert packed == pytest.approx(separate, rel=1e-5)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-5, f"{name}: {error}"
