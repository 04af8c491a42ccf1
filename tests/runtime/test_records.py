"""Records are complete, atomic and refuse what they do not understand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import (
    Stopwatch,
    read_jsonl,
    read_record,
    write_bytes_atomic,
    write_json_atomic,
    write_jsonl_atomic,
    write_record,
)


def test_record_round_trip(tmp_path):
    record = Stopwatch().record(
        "solve", "tiny", {"out": Path("x"), "tasks": ("a",)}, {"accuracy": 0.5, "ppl": math.inf}
    )
    write_record(tmp_path / "r.json", record)
    again = read_record(tmp_path / "r.json")
    assert again == record
    assert again.results == {"accuracy": 0.5, "ppl": "inf"}
    assert again.config == {"out": "x", "tasks": ["a"]}
    assert again.environment["packages"]["torch"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON file"), ("[]", "not a mambacus record"), ('{"kind": "x"}', "not a mambacus record")],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "r.json")


def test_unknown_schema_is_refused(tmp_path):
    write_record(tmp_path / "r.json", Stopwatch().record("solve", "m", {}, {}))
    raw = json.loads((tmp_path / "r.json").read_text()) | {"schema": 99}
    write_json_atomic(tmp_path / "r.json", raw)
    with pytest.raises(UserError, match="schema 99"):
        read_record(tmp_path / "r.json")


def test_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "f"
    write_bytes_atomic(target, b"old")

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_bytes_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_jsonl_round_trip_and_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl_atomic(path, [{"a": 1}, {"b": "ü"}])
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"b": "ü"})]
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"line 3: not valid JSON"):
        list(read_jsonl(path))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected a JSON object, got a list"):
        list(read_jsonl(path))
    with pytest.raises(UserError, match="cannot read"):
        list(read_jsonl(tmp_path / "missing"))
