"""The paired table in a terminal: figures, words and the warning of a sample too small."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import write_solve

from mambacus.cli import main


def drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], one: list[bool], two: list[bool]) -> str:
    write_solve(tmp_path / "a.json", "one", {"gsm8k": one})
    write_solve(tmp_path / "b.json", "two", {"gsm8k": two})
    records = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["report", *records, "--out", str(tmp_path / "r.html")]) == 0
    return capsys.readouterr().out


def test_a_clear_difference_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = drawn(tmp_path, capsys, [True] * 20 + [False] * 180, [True] * 15 + [False] * 100 + [True] * 85)
    assert "two against one" in out
    (row,) = [line for line in out.splitlines() if line.startswith("GSM8K  ")]
    assert row.split()[:9] == ["GSM8K", "accuracy", "200", "10.0", "%", "50.0", "%", "+40.0", "points"]
    assert row.split()[-5:] == ["85", "5", "<", "0.0001", "better"]
    assert "GSM8K, accuracy: better, +40.0 points" in out
    assert "four times in five" not in out


def test_a_small_sample_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = drawn(tmp_path, capsys, [True] * 4 + [False] * 36, [True] * 6 + [False] * 34)
    assert "no difference is shown" in out and "a smoke test rather than a measurement" in out
    # two of 40 items differ: (1.96 + 0.84) * sqrt(0.05 / 40) = 9.9 points, and 40 * (9.9 / 5)^2 = 157 items for 5
    assert "40 items show a difference of 9.9 points four times in five" in out
    assert "for one of 5.0 points it takes about 160" in out


def test_equal_models_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = drawn(tmp_path, capsys, [True, False] * 60, [True, False] * 60)
    assert " open" in out and "it takes about" not in out
