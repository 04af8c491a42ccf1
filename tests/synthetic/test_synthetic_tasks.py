"""The tasks: labels that an oracle finds from what stands before them, disjoint splits, equal draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mambacus.runtime.errors import UserError
from mambacus.synthetic.addition import EQUALS, PLUS
from mambacus.synthetic.examples import (
    Examples,
    answers_right,
    examples_of,
    held_out,
    mixed_rows,
    row_hash,
    training_sets,
)
from mambacus.synthetic.phonebook import ASK, IS
from mambacus.synthetic.tasks import END, IGNORE, PAD, SYMBOLS, make_task
from mambacus.synthetic.words import tokenizer

KINDS = {
    "copy": ({}, 7), "phonebook": ({}, 5), "mqar": ({"keys": 20, "values": 9}, 6),
    "addition": ({}, 5), "wordproblems": ({}, 3),
}  # fmt: skip


def task(kind, **settings):
    return make_task(kind, settings or KINDS[kind][0], "task")


def draw(kind, rows=64, x=None, seed=3, **settings):
    made = task(kind, **settings)
    return made.draw(np.random.default_rng(seed), rows, x or KINDS[kind][1])


# Oracles: the answer from what stands before it, row by row, as a reader would find it


def copied(row, place):
    mark = list(row).index(3)
    text = [*row[1:mark], END]
    return text[place - mark - 1]


def looked_up(row, place):
    entry = 3 + 4 + 2
    book = list(row[1 : list(row).index(ASK)])
    numbers = {tuple(book[at : at + 3]): book[at + 4 : at + 8] for at in range(0, len(book), entry)}
    colon = max(at for at in range(place) if row[at] == IS)
    return numbers[tuple(row[colon - 3 : colon])][place - colon - 1]


def recalled(row, place):
    pairs = list(row[1 : 1 + len(row) // 2])
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[row[place - 1]]


def added(row, place):
    row = list(row)
    plus, equals = row.index(PLUS), row.index(EQUALS)
    left, right = (int("".join(str(d - SYMBOLS) for d in part)) for part in (row[1:plus], row[plus + 1 : equals]))
    digits = str(left + right)
    return [*(SYMBOLS + int(digit) for digit in digits), END][place - equals - 1]


@pytest.mark.parametrize(
    ("kind", "oracle"), [("copy", copied), ("phonebook", looked_up), ("mqar", recalled), ("addition", added)]
)
def test_an_oracle_finds_every_answer(kind, oracle):
    ids, labels = draw(kind)
    assert ids.shape == labels.shape == (64, task(kind).length(KINDS[kind][1]))
    assert (ids >= 0).all() and (ids < task(kind).vocab_size).all()
    scored = labels != IGNORE
    assert (labels[scored] == ids[scored]).all()
    for row, column in zip(*np.nonzero(scored), strict=True):
        assert oracle(ids[row].tolist(), column) == labels[row, column]


def test_reversed_sums_are_plain_sums_read_backwards():
    plain, plain_labels = draw("addition", order="plain")
    backward, labels = draw("addition", order="reversed")
    for row in range(len(plain)):
        assert (plain[row, :13] == backward[row, :13]).all()
        answer, other = (list(lab[row][lab[row] != IGNORE]) for lab in (plain_labels, labels))
        assert answer[-1] == other[-1] == END
        assert answer[:-1] == other[:-1][::-1]
    lengths = {int((row != IGNORE).sum()) for row in labels}
    assert lengths == {6, 7}  # with and without a carry into a sixth digit, and the end mark


def test_no_name_or_key_stands_twice():
    ids, _ = draw("phonebook", x=40)
    names = ids[:, 1 : 1 + 9 * 40].reshape(64, 40, 9)[:, :, :3]
    assert all(len({tuple(name) for name in book}) == 40 for book in names.tolist())
    keys = draw("mqar", x=20)[0][:, 1:41:2]
    assert all(len(set(row)) == 20 for row in keys.tolist())
    assert len({tuple(row) for row in keys.tolist()}) > 1  # in random order also where all keys stand


def test_word_problems_are_read_back():
    ids, labels = draw("wordproblems", rows=8)
    for row, label in zip(ids, labels, strict=True):
        answer = tokenizer().decode(label[label != IGNORE].tolist(), skip_special_tokens=False)
        text = tokenizer().decode(row.tolist(), skip_special_tokens=False)
        assert f"Answer:{answer}" in text
        assert answer.count("\n") == 3 and "#### " in answer  # three steps, then the result
        last = answer.splitlines()[-2].split(" = ")[1].split()[0]
        assert answer.splitlines()[-1].startswith(f"#### {last}")


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_deterministic_and_seeds_differ(kind):
    for first, second in zip(draw(kind), draw(kind), strict=True):
        assert (first == second).all()
    assert (draw(kind)[0] != draw(kind, seed=4)[0]).any()


@pytest.mark.parametrize("kind", ["copy", "addition", "mqar"])
def test_splits_are_disjoint(kind):
    made = task(kind)
    x = 2  # few enough problems for the same to be drawn again and again
    size = made.length(x)
    (train,) = training_sets(made, [3000], [x], seed=0)
    assert len(train) == 3000
    seen = set(row_hash(train.input_ids.numpy()).tolist())
    for split in ("test", "valid"):
        rows = held_out(made, split, 30, x, seed=0)
        keys = row_hash(rows.input_ids.numpy())
        assert rows.input_ids.shape == (30, size)
        assert len(set(keys.tolist())) == 30
        assert not seen & set(keys.tolist())
        assert not seen & set(row_hash(held_out(made, split, 30, x, seed=9).input_ids.numpy()).tolist())
        seen |= set(keys.tolist())


def test_too_few_problems_are_refused():
    with pytest.raises(UserError, match=r"digits 1: expected 500 different test problems, there are about \d+"):
        held_out(task("addition"), "test", 500, 1, seed=0)


def test_training_sets_have_one_difficulty_each():
    short, long = training_sets(task("mqar"), [30, 50], [1, 4], seed=0)
    assert short.input_ids.shape == (30, 5) and long.input_ids.shape == (50, 17)
    assert not (short.input_ids == PAD).any() and not (long.input_ids == PAD).any()
    again = training_sets(task("mqar"), [30, 50], [1, 4], seed=0)
    assert torch.equal(again[0].input_ids, short.input_ids) and torch.equal(again[1].targets, long.targets)


def test_mixed_rows_are_filled():
    rows = mixed_rows(task("addition"), "valid", 400, [1, 4], seed=0)
    assert rows.input_ids.shape == (400, 17)
    short = rows.input_ids[:, 2] == PLUS
    assert 120 < int(short.sum()) < 280
    assert bool((rows.input_ids[short, 8:] == PAD).all())
    again = mixed_rows(task("addition"), "valid", 400, [1, 4], seed=0)
    assert torch.equal(rows.input_ids, again.input_ids) and torch.equal(rows.targets, again.targets)


def test_places_predict_the_labels():
    ids = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]], np.int16)
    labels = np.array([[-100, 6, 7, -100, 9], [-100, -100, 7, -100, -100]], np.int16)
    rows = examples_of(ids, labels)
    assert rows.places.tolist() == [[0, 1, 3], [1, 0, 0]]
    assert rows.targets.tolist() == [[6, 7, 9], [7, -100, -100]]
    with pytest.raises(ValueError, match="first token"):
        examples_of(ids, ids)


def test_an_answer_is_right_only_as_a_whole():
    places = torch.tensor([[3, 4, 6, 7], [2, 3, 0, 0]], dtype=torch.int16)
    targets = torch.tensor([[11, 12, 13, 14], [15, 16, -100, -100]], dtype=torch.int16)
    rows = Examples(torch.zeros(2, 9, dtype=torch.int16), places, targets)
    assert answers_right(rows, targets.clone()) == (3, 3)
    assert answers_right(rows, torch.tensor([[11, 99, 13, 14], [15, 16, 5, 5]])) == (2, 3)
    assert answers_right(rows, torch.tensor([[99, 99, 13, 99], [15, 16, 5, 5]])) == (1, 3)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mqr", {}, "did you mean 'mqar'"),
        ("mqar", {"key": 4}, "unknown key 'key'; did you mean 'keys'"),
        ("mqar", {"keys": 1}, "--keys: expected 2 or more"),
        ("addition", {"order": "sideways"}, "one of plain, reversed"),
        ("wordproblems", {"templates": "tset"}, "did you mean 'test'"),
    ],
)
def test_bad_tasks(kind, settings, message):
    with pytest.raises(UserError, match=message):
        make_task(kind, settings, "recipe r: tasks[0]")


def test_a_word_problem_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="max_tokens: expected at least"):
        draw("wordproblems", rows=50, x=4, max_tokens=64)
