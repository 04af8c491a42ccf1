"""Text token by token equals the text of all tokens, whatever the tokens are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mambacus.inference.text import TextStream, decode, shown_tokens
from mambacus.models import load_tokenizer

SAMPLES = ("plain words", "naïve café, 東京 🙂🙃 and 👩‍👩‍👧", "\n\n  tabs\tand   spaces ", "½ é ﬁ ‱")


def check(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> None:
    stream, given = TextStream(tokenizer, stop), ""
    for number, token in enumerate(ids, start=1):
        cut = stream.add(token)
        expected = decode(tokenizer, ids[:number])
        assert stream.text == expected
        places = [expected.find(one) for one in stop if one in expected]
        assert cut == (min(places) if places else None)
        if cut is not None:
            text = stream.text[:cut]
            assert text.startswith(given)
            assert given + stream.close(text) == text
            return
        given += stream.take()
        assert expected.startswith(given)
    assert given + stream.close(stream.text) == decode(tokenizer, ids)


@pytest.mark.parametrize("stop", [(), ("and", "  "), ("🙃",), ("zz", "é")])
def test_real_text(tokenizer: Any, stop: tuple[str, ...]) -> None:
    for text in SAMPLES:
        check(tokenizer, tokenizer(text)["input_ids"], stop)


def test_merged_tokens(data_dir: Path) -> None:
    tokenizer = load_tokenizer("random:130m", data_dir=data_dir)
    for text in SAMPLES:
        for stop in ((), ("and", "  "), ("🙃",)):
            check(tokenizer, tokenizer(text)["input_ids"], stop)


def test_bytes_that_are_no_text(tokenizer: Any) -> None:
    text = "".join(map(chr, range(0x20, 0x800))) + "\u20ac\u1234🙂\U000e0001"
    table = dict(zip(text.encode(), tokenizer(text)["input_ids"], strict=True))  # byte -> token
    rng = random.Random(0)
    for _ in range(150):
        ids = [table[rng.choice(b"\x80\xbf\xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x41")] for _ in range(60)]
        check(tokenizer, ids, ("A\u20ac",))


def test_the_window_stays_small(tokenizer: Any) -> None:
    for byte in (0x80, 0xE2, 0xF0, 0x41):
        stream = TextStream(tokenizer)
        for _ in range(200):
            stream.add(byte + 1)
            stream.take()
        assert len(stream._window) < 40 and len(stream._complete) > 150


def test_the_tokens_of_a_text_that_was_cut_before_a_stop_string() -> None:
    tokenizer = load_tokenizer("tiny")
    he, has, seven, apples, dot = ids = tokenizer(" He has seven apples.")["input_ids"]
    assert shown_tokens(tokenizer, ids, " He has seven apples") == [he, has, seven, apples]
    cut = shown_tokens(tokenizer, ids, " He has seven app")  # the stop string is "les."
    assert cut[:3] == [he, has, seven] and apples not in cut and decode(tokenizer, cut) == " He has seven app"
    assert shown_tokens(tokenizer, ids, "") == []
    east = tokenizer("東!")["input_ids"]
    assert shown_tokens(tokenizer, [dot, *east], ".") == [dot]  # none of the tokens that make one letter
    assert shown_tokens(tokenizer, [dot, *east], ".東") == [dot, *east[:-1]]
