"""The corpus: clean text, documents in order, equal streams whoever makes them, nothing of the answer format."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mambacus.data import corpus
from mambacus.data.corpus import STREAMS, VALID_STREAMS, Recipe, Stream, build_streams, clean, read_text, without_marks
from mambacus.data.sources import TEXT_FILES
from mambacus.data.tokenizer import EOS_ID, train_tokenizer
from mambacus.runtime.errors import UserError

RECIPE = Recipe(narratives=60, sum_sheets=10, seed=0)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus.narratives(0, 0, 800), 500).save(str(path))
    return path


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for name, files in TEXT_FILES.items():
        for number, file in enumerate(files):
            row = {"id": f"{name}-{number}", "text": f"It was {name} number {number}.\n\nThe end came soon."}
            if name == "arithmetic_train":
                row = {"question": "What is 2 + 3?", "answer": "5"}
            line = (json.dumps(row) + "\n").encode() * 2
            if name == "arithmetic_train":
                line += json.dumps({"question": "Is 7 prime?", "answer": "True"}).encode() + b"\n"
            if name == "books_valid":
                line += json.dumps({"id": "m", "text": "One.\n\nAnswer: two."}).encode() + b"\n"
            (folder / "text" / file).write_bytes(gzip.compress(line) if file.endswith(".gz") else line)
    return folder


@pytest.fixture(scope="module")
def build(small_data: Path, tokenizer_file: Path) -> Callable[..., dict[str, Stream]]:
    def call(cache: Path, recipe: Recipe = RECIPE, workers: int = 1) -> dict[str, Stream]:
        return build_streams(small_data, tokenizer_file, recipe, cache, workers)

    return call


def test_hard_wrapped_lines_are_joined() -> None:
    line = "this line of an old book was wrapped at a width of about seventy letters"
    paragraph = [line] * 9 + ["and ended here."]
    assert clean("\n\n".join(paragraph * 10)).split("\n\n") == [" ".join(paragraph)] * 10


def test_ordinary_paragraphs_stay() -> None:
    text = "\n\n".join(["A paragraph. " + "It has a middle part. " * 20 + "It ends.", "Short one."] * 40)
    assert clean(text) == text
    assert clean("a\u00a0b\u200b") == "a b"


def test_marked_paragraphs_are_left_out_and_counted() -> None:
    assert without_marks("One.\n\nAnswer: two.\n\nThree.") == ("One.\n\nThree.", 1)
    assert without_marks("Fine.") == ("Fine.", 0)


def test_documents_start_with_eos_and_decode_to_the_text(
    build: Callable[..., dict[str, Stream]], tokenizer_file: Path, small_data: Path, tmp_path: Path
) -> None:
    streams = build(tmp_path)
    assert set(streams) == {*STREAMS, *VALID_STREAMS}
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    for name, stream in streams.items():
        assert stream.tokens.dtype == np.uint16
        assert stream.tokens[0] == EOS_ID
        assert (stream.tokens == EOS_ID).sum() == stream.documents, name
    text = tokenizer.decode([*map(int, streams["text"].tokens)], skip_special_tokens=False)
    documents = text.split("<|endoftext|>")[1:]
    assert documents == list(read_text(small_data, "stories_train", "books_train"))
    assert {name: stream.left_out for name, stream in streams.items() if stream.left_out} == {
        "sums": 1,
        "books_valid": 1,
    }
    assert streams["text"].text_bytes == sum(map(len, documents))
    stories = tokenizer.decode([*map(int, streams["narratives"].tokens)], skip_special_tokens=False)
    assert stories.split("<|endoftext|>")[1:] == corpus.narratives(0, 0, 60)


def test_streams_do_not_depend_on_the_number_of_workers(
    build: Callable[..., dict[str, Stream]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_DOCUMENTS_PER_TASK", 16)
    one, two = build(tmp_path / "1"), build(tmp_path / "2", workers=2)
    assert all(np.array_equal(one[name].tokens, two[name].tokens) for name in one)
    assert one["narratives"].documents == 60


def test_cache_is_read_for_the_same_recipe_only(
    build: Callable[..., dict[str, Stream]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path)
    monkeypatch.setattr(corpus, "_submit", lambda *_: pytest.fail("made again"))
    again = build(tmp_path)
    assert all(np.array_equal(first[name].tokens, again[name].tokens) for name in first)
    assert all(first[name].about() == again[name].about() for name in first)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        build(tmp_path, Recipe(narratives=61, sum_sheets=10, seed=0))


def test_long_documents_are_cut_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_CHUNK_CHARS", 50)
    documents = ["A sentence of thirty letters here.\n\n" * 9, "x" * 170, "short"]
    pieces = [piece for task in corpus._chunks(documents, 0) for piece in task]
    assert "".join(text for _, text in pieces) == "".join(documents)
    assert sum(first for first, _ in pieces) == 3
    assert max(len(text) for _, text in pieces) <= 50


def test_limit_stops_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_CHUNK_CHARS", 50)
    taken = sum(len(text) for task in corpus._chunks(["y" * 40] * 100, 200) for _, text in task)
    assert 200 <= taken <= 300


def test_missing_text_is_named(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match=r"missing books_train_1.jsonl.gz"):
        build_streams(tmp_path, tokenizer_file, RECIPE, tmp_path / "cache", 1)


def test_real_text_has_no_marks(data_dir: Path) -> None:
    left_out: Counter[str] = Counter()
    for text in read_text(data_dir, "stories_train", "books_valid", left_out=left_out):
        assert not any(mark in text for mark in corpus.FORBIDDEN)
    assert sum(left_out.values()) < 20
