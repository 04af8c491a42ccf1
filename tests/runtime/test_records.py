"""Records are complete, atomic and refuse what they do not understand."""

from __future__ import annotations

import json
import math
import os
import sys
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
    ("started_as", "words"),
    [
        ("{bin}/mambacus", ["mambacus"]),
        ("{bin}/mambacus.exe", ["mambacus"]),
        ("{bin}/mambacus/__main__.py", ["mambacus"]),
        ("{here}/benchmarks/tied_merge.py", ["python", "benchmarks/tied_merge.py"]),
        ("benchmarks/tied_merge.py", ["python", "benchmarks/tied_merge.py"]),
        ("{bin}/tied_merge.py", ["python", "tied_merge.py"]),
        ("-c", ["python", "-c"]),
        ("", ["python"]),
    ],
)
def test_the_command_names_the_program_that_ran(tmp_path, monkeypatch, started_as, words):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [started_as.format(bin=tmp_path / "bin", here=here), "--out", "r.json"])
    assert Stopwatch().record("bench", "m", {}, {}).command == [*words, "--out", "r.json"]


def test_committed_records_of_scripts_name_the_script():
    folder = Path(__file__).parents[2] / "benchmarks"
    commands = {path.name: json.loads(path.read_text())["command"] for path in folder.rglob("*.json")}
    scripts = {name: command for name, command in commands.items() if command[0] != "mambacus"}
    assert len(scripts) >= 5
    assert all(command[0] == "python" and (folder.parent / command[1]).is_file() for command in scripts.values())
    assert all(not command[1].startswith("-") for command in commands.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got null"),
        ('{"kind": "x"}', "not a mambacus record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "r.json")
    with pytest.raises(UserError, match="Is a directory"):
        read_record(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("kind", ["solve"]), ("config", None), ("results", []), ("label", 3)])
def test_a_record_with_a_part_of_another_type_is_refused(tmp_path, key, value):
    write_record(tmp_path / "r.json", Stopwatch().record("solve", "m", {}, {}))
    write_json_atomic(tmp_path / "r.json", json.loads((tmp_path / "r.json").read_text()) | {key: value})
    with pytest.raises(UserError, match=f"{key}: expected a "):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "line 1: not valid JSON (NaN is no JSON value)"),
        (b'{"a": -Infinity}', "line 1: not valid JSON (-Infinity is no JSON value)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not valid JSON (Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        (b'[\n {"a": 1},', "line 1: not valid JSON (Expecting value at column 2); expected one object a line"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
        (b'{"a": 1}{"b": 2}', "line 1: not valid JSON (Extra data at column 9)"),
    ],
)
def test_lines_that_are_no_json_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path))
    assert message in str(caught.value)


def test_byte_order_marks_and_foreign_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match="cannot make the folder"):
        write_bytes_atomic(tmp_path / "f" / "r.json", b"new")
    assert (tmp_path / "f").read_text() == "old"
