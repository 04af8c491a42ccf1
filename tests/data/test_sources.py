"""The layout of the data folder: what is read, and what is said when it is not there."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest

from mambacus.data.sources import MATH_SPLITS, TEXT_FILES, load_math, read_rows, text_files, training_split
from mambacus.runtime.errors import UserError


def _write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_loads_a_set(tmp_path: Path) -> None:
    row = {"id": "a-1", "question": "2+2?", "answer": "B", "solution": None, "options": ["3", "4"], "source": "here"}
    _write(tmp_path / "math" / "aqua" / "test.jsonl", row)
    (problem,) = load_math(tmp_path, "aqua", "test")
    assert problem.options == ("3", "4")
    assert (problem.id, problem.question, problem.answer, problem.solution) == ("a-1", "2+2?", "B", None)


def test_wordproblems_need_no_folder() -> None:
    problems = load_math(None, "wordproblems", "test")
    assert len(problems) == 1000
    assert problems != load_math(None, "wordproblems", "test", seed=1)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("gsm8", "test", "unknown math set 'gsm8'.*did you mean 'gsm8k'"),
        ("svamp", "train", "svamp has no split 'train': expected test"),
        ("wordproblems", "dev", "wordproblems has no split 'dev'"),
        ("gsm8k", "test", "expected a file .*gsm8k/test.jsonl"),
    ],
)
def test_what_is_not_there(tmp_path: Path, name: str, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_math(tmp_path, name, split)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-dir: missing"):
        load_math(None, "gsm8k", "test")
    with pytest.raises(UserError, match="no such folder"):
        load_math(tmp_path / "nowhere", "gsm8k", "test")


def test_bad_row_is_named(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "1"}
    path = _write(tmp_path / "math" / "svamp" / "test.jsonl", good, {"question": "q", "answer": 2})
    with pytest.raises(UserError, match=f"{path}, line 2: 'answer'"):
        load_math(tmp_path, "svamp", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": 5}, "options: expected a list of texts, got 5"),
        ({"options": ["1", 2]}, "options: expected a list of texts"),
        ({"options": ["1"] * 11}, "options: expected at most 10, got 11"),
        ({"options": ["1", "2"], "answer": "C"}, "answer: expected one of A, B for 2 options, got 'C'"),
        ({"options": ["1", "2"], "answer": "AB"}, "answer: expected one of A, B for 2 options, got 'AB'"),
        ({"solution": 7}, "'solution': expected a text, got 7"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    _write(tmp_path / "math" / "aqua" / "test.jsonl", {"question": "q", "answer": "A"} | changes)
    with pytest.raises(UserError, match=f"line 1: {message}"):
        load_math(tmp_path, "aqua", "test")


def test_each_set_knows_what_it_is_trained_on() -> None:
    assert [training_split(name) for name in ("gsm8k", "aqua", "wordproblems")] == ["train", "train_flan", "train"]
    for name, message in (("svamp", "svamp has no split 'train': expected test"), ("gsm9k", "did you mean 'gsm8k'")):
        with pytest.raises(UserError, match=message):
            training_split(name)


def test_text_files_name_all_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "books_train_1.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"missing books_train_2.jsonl.gz, .*books_train_5.jsonl.gz"):
        text_files(tmp_path, "books_train")


def test_reads_plain_and_compressed_rows(tmp_path: Path) -> None:
    plain = _write(tmp_path / "a.jsonl", {"text": "é"})
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_rows(plain)) == list(read_rows(packed)) == [{"text": "é"}]


def test_broken_archive_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-20])
    with pytest.raises(UserError, match=str(broken)):
        list(read_rows(broken))
    for content in (b"", b"no archive", gzip.compress(b"\xff\xfe"), b"\x1f\x8b\x08" + b"garbage" * 9):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=str(broken)) if content else contextlib.nullcontext():
            list(read_rows(broken))
    broken.write_bytes(gzip.compress(b'{"text": "x"}\n\n[1]\n'))
    with pytest.raises(UserError, match="line 3: expected a JSON object"):
        list(read_rows(broken))


def test_every_listed_set_is_there(data_dir: Path) -> None:
    for name, splits in MATH_SPLITS.items():
        for split in splits:
            assert load_math(data_dir, name, split), (name, split)
    for name in TEXT_FILES:
        assert text_files(data_dir, name)
