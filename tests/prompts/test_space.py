"""The space of prompts: what is drawn and edited stays within it; a YAML file extends it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mambacus.prompts import DEFAULT, Exemplar, Prompt
from mambacus.prompts.space import OPERATORS, Space, load_space
from mambacus.runtime.errors import UserError

POOL = tuple(Exemplar(f"{n}?", f" #### {n}") for n in range(6))


@pytest.fixture
def space() -> Space:
    return load_space(None, POOL)


def test_drawing_reaches_every_part_and_repeats_with_its_seed(space: Space) -> None:
    drawn = [space.draw(random.Random(seed)) for seed in range(200)]
    assert drawn == [space.draw(random.Random(seed)) for seed in range(200)]
    assert {prompt.question for prompt in drawn} == set(space.frames)
    assert {prompt.instruction for prompt in drawn} == set(space.instructions)
    assert {len(prompt.exemplars) for prompt in drawn} == {0, 1, 2, 3, 4, 6}  # 8 are more than the pool holds
    assert all(len(set(prompt.exemplars)) == len(prompt.exemplars) for prompt in drawn)


def test_every_operator_does_what_it_says(space: Space) -> None:
    prompt = Prompt(instruction="Solve each problem step by step.", exemplars=POOL[:3])
    for name, operator in OPERATORS.items():
        for seed in range(20):
            edited = operator(space, prompt, random.Random(seed))
            assert edited is not None
            before, after = list(prompt.exemplars), list(edited.exemplars)
            if name == "add":
                assert len(after) == 4 and [e for e in after if e in before] == before
            elif name == "delete":
                assert len(after) == 2 and [e for e in before if e in after] == after
            elif name == "exchange":
                assert len(after) == 3 and sum(a != b for a, b in zip(before, after, strict=True)) == 1
            elif name == "swap":
                assert after != before and set(after) == set(before)
            elif name == "paraphrase":
                assert edited.instruction != prompt.instruction and after == before
            elif name == "instruction":
                assert edited.instruction in space.instructions
            elif name == "frame":
                assert edited.question in space.frames
            else:
                assert edited.separator in space.separators


def test_operators_that_do_not_apply_are_passed_over(space: Space) -> None:
    for seed in range(30):
        found = space.edit(DEFAULT, random.Random(seed))
        assert found is not None and found[0] in ("add", "instruction", "frame", "separator") and found[1] != DEFAULT


def test_a_file_adds_or_replaces(tmp_path: Path, space: Space) -> None:
    file = tmp_path / "s.yaml"
    file.write_text('instructions: ["Mine."]\nshots: [16]\n', encoding="utf-8")
    wider = load_space(file, POOL)
    assert wider.instructions == (*space.instructions, "Mine.") and wider.shots == (*space.shots, 16)
    file.write_text('builtin: false\nframes: ["{question} ="]\nshots: [2]\n', encoding="utf-8")
    own = load_space(file, POOL)
    assert (own.frames, own.shots, own.instructions, own.separators) == (("{question} =",), (2,), ("",), ("\n\n",))


def test_the_documented_space_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/prompts.md").read_text(encoding="utf-8")
    [example] = [block for block in text.split("```yaml\n")[1:] if block.startswith("builtin: false")]
    file = tmp_path / "s.yaml"
    file.write_text(example.partition("```")[0], encoding="utf-8")
    space = load_space(file, POOL)
    assert space.frames == ("Q: {question}\nA:", "{question}\nSolution:") and space.shots == (4, 8)
    assert space.separators == ("\n\n", "\n---\n") and "" in space.instructions and len(space.paraphrases[0]) == 3


def test_a_number_of_examples_binds_drawing_and_editing(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("shots: [16]\n", encoding="utf-8")
    space = load_space(file, POOL, shots=[4])
    assert space.shots == (4,) and len(space.instructions) > 1
    chance = random.Random(0)
    prompt = space.draw(chance)
    for _ in range(60):
        assert len(prompt.exemplars) == 4
        edited = space.edit(prompt, chance)
        assert edited is not None
        prompt = edited[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frame: []", "unknown key 'frame'"),
        ("frames: x", "frames: expected a list, got 'x'"),
        ("frames: [no slot]", "expected texts with {question} once, got 'no slot'"),
        ("shots: [-1]", "expected numbers of examples, 0 or more, got -1"),
        ("paraphrases: [[one]]", "expected lists of two or more different phrases"),
        ("paraphrases: [[one, one]]", "expected lists of two or more different phrases"),
        ("builtin: 3", "builtin: expected true or false, got 3"),
        ("builtin: false", "frames: expected at least one"),
        ("instructions: [1]", "expected texts, got 1"),
    ],
)
def test_faults_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_space(file, POOL)
    assert message in str(error.value) and "s.yaml" in str(error.value)
