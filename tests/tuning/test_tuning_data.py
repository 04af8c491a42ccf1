"""Reading and tokenising training rows: what is asked, what is trained on, what is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mambacus.data.prompts import qa_prompt
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError
from mambacus.tuning.data import IGNORED, Example, encode, read_examples

ROW = {"question": "2 + 3?", "answer": "5", "solution": "2 + 3 = 5"}


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_a_row_becomes_the_prompt_of_evaluation_and_the_solution_with_its_answer_line(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", ROW))
    assert example.prompt == qa_prompt("2 + 3?") == "Question: 2 + 3?\nAnswer:"
    assert example.completion == " 2 + 3 = 5\n#### 5"


def test_choices_are_trained_on_as_they_are_asked(tmp_path: Path) -> None:
    row = {"id": "1", "question": "Pick three.", "answer": "B", "options": ["2", "3"], "solution": "It is 3."}
    (tmp_path / "math" / "aqua").mkdir(parents=True)
    path = write(tmp_path / "math" / "aqua" / "train_flan.jsonl", row)
    for source in (path, "aqua"):
        (example,) = read_examples(source, data_dir=tmp_path)
        assert example.prompt == "Question: Pick three.\nAnswer Choices: (A) 2 (B) 3\nAnswer:"
        assert example.completion == " It is 3.\n#### B"


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"question": "q", "answer": "5"}, " #### 5"),
        ({"question": "q", "answer": 5}, " #### 5"),
        ({"question": "q", "answer": "5", "solution": None}, " #### 5"),
        ({"question": "q", "answer": "2 + 3 = 5\n#### 5"}, " 2 + 3 = 5\n#### 5"),
        ({"question": "q", "answer": "It is five."}, " It is five."),
        ({"question": "q", "answer": "5", "solution": "so 5\n#### 5"}, " so 5\n#### 5"),
    ],
)
def test_each_kind_of_answer(tmp_path: Path, row: object, completion: str) -> None:
    assert read_examples(write(tmp_path / "a.jsonl", row))[0].completion == completion


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "q", "answer":', ("line 2", "not valid JSON")),
        ("[1, 2]", ("line 2", "expected a JSON object")),
        ('{"question": "q"}', ("line 2", "missing key 'answer'")),
        ('{"answer": "5", "prompt": "q"}', ("line 2", "missing key 'question'", "answer, prompt")),
        ('{"question": "  ", "answer": "5"}', ("line 2", "question is empty")),
        ('{"question": "q", "answer": ""}', ("line 2", "answer is empty")),
        ('{"question": ["q"], "answer": "5"}', ("line 2", "question", "list")),
        ('{"question": "q", "answer": true}', ("line 2", "answer", "bool")),
        ('{"question": "q", "answer": "5", "solution": ""}', ("line 2", "solution is empty")),
        ('{"question": "q", "answer": NaN}', ("line 2", "NaN is no JSON value")),
        ('{"question": "q \\ud800", "answer": "5"}', ("line 2", "question", "surrogate")),
        ('{"question": "q", "answer": "5", "options": ["5", "6"]}', ("line 2", "expected one of A, B")),
        ('{"question": "q", "answer": "A", "options": "5"}', ("line 2", "options", "list of texts")),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    source = write(tmp_path / "a.jsonl", ROW, line)
    with pytest.raises(UserError) as error:
        read_examples(source)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (source, *words)), message


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="no rows"):
        read_examples(str(path))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("gsm9k", "gsm8k"),
        ("gsm8k", "--data-dir"),
        ("wordproblems:many", "number of rows"),
        ("wordproblems:0", "number of rows"),
        ("wordproblems:", "number of rows"),
        ("svamp", "no split 'train'"),
    ],
)
def test_unknown_sources(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_examples(source)


def test_a_dataset_of_the_hub_gives_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        assert (name, split) == ("owner/sums", "train")
        return [ROW, ROW, {"question": "q"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_examples("owner/sums:2")) == 2
    with pytest.raises(UserError, match="owner/sums, row 3: missing key 'answer'"):
        read_examples("owner/sums")


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"--data owner/sums: no such file, and not .* \(no network\)"):
        read_examples("owner/sums")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_examples(str(path))


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(UserError, match="expected a JSONL file, got a folder"):
            read_examples(str(path))


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROW)}\r\n\r\n{json.dumps(ROW)}".encode())
    assert len(read_examples(str(path))) == 2


def test_generated_problems_follow_the_seed() -> None:
    first, again, other = (read_examples("wordproblems:5", seed=seed) for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again != other


def test_a_set_of_the_data_folder_gives_its_training_split(data_dir: Path) -> None:
    examples = read_examples("gsm8k:20", data_dir=data_dir)
    assert len(examples) == 20
    assert all("\n#### " in example.completion for example in examples)


def test_only_the_answer_is_trained_on_and_its_end_always() -> None:
    tokenizer = byte_tokenizer()
    example = Example("Question: a?\nAnswer:", " b\n#### 1")
    (sample,), counts = encode([example], tokenizer, max_length=99)
    assert tokenizer.decode(sample.ids) == example.prompt + example.completion + tokenizer.eos_token
    assert (sample.labels[: len(example.prompt)] == IGNORED).all()
    assert np.array_equal(sample.labels[len(example.prompt) :], sample.ids[len(example.prompt) :])
    assert sample.labels[-1] == tokenizer.eos_token_id
    assert counts["trained_tokens"] == len(example.completion) + 1


def test_the_full_text_can_be_trained_on() -> None:
    (sample,), _ = encode([Example("ab", "cd")], byte_tokenizer(), max_length=99, loss="full")
    assert sample.labels[0] == IGNORED  # nothing precedes it
    assert np.array_equal(sample.labels[1:], sample.ids[1:])


def test_what_is_left_out_is_counted() -> None:
    short, long = Example("ab", "cd"), Example("a" * 20, "b#### 1")
    samples, counts = encode([short, long, short], byte_tokenizer(), max_length=5)
    assert len(samples) == counts["kept"] == 2
    assert counts["rows"] == 3
    assert counts["dropped"] == {"longer than 5 tokens": 1}
    assert counts["truncated"] == 0
    assert counts["duplicates"] == 1
    assert counts["without_answer_line"] == 2
    assert counts["tokens"] == 10


def test_a_sample_of_just_the_allowed_length_stays() -> None:
    assert encode([Example("ab", "cd")], byte_tokenizer(), max_length=5)[1]["kept"] == 1


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match="all 1 rows are longer"):
        encode([Example("ab", "cd")], byte_tokenizer(), max_length=4)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-text"):
        encode([Example("ab", "cd")], tokenizer, max_length=9)
