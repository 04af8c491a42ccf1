"""The verb ``bench generation``: one row per model, whichever side runs it, with the original study's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambacus.cli import main
from mambacus.models import load, save
from mambacus.runtime.records import read_record


@pytest.mark.parametrize("implementation", ["mambacus", "hf"])
def test_a_row_for_either_implementation(
    tmp_path: Path, implementation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(*load("random:micro")[:1], tmp_path / "model", load("random:micro")[1])
    out = tmp_path / "g.json"
    argv = ["bench", "generation", "--model", str(tmp_path / "model"), "--prompts", "wordproblems", "--limit", "2",
            "--new-tokens", "5", "--repeats", "2", "--device", "cpu", "--implementation", implementation]  # fmt: skip
    assert main([*argv, "--out", str(out), "--label", "m"]) == 0
    record = read_record(out)
    (row,) = record.results["rows"]
    assert (record.kind, record.label, row["benchmark"], row["model"]) == ("bench", "m", "generation", "m")
    assert row["implementation"] == {"mambacus": "mambacus", "hf": "transformers"}[implementation]
    assert row["new_tokens"] <= 5 and row["seqlen"] > 20 and len(row["samples_ms"]) == 2
    assert row["tokens_per_second"] == pytest.approx(1e3 * row["new_tokens"] / row["median_ms"], rel=0.2)
    assert record.config["top_k"] == 1 and record.config["temperature"] == 1.0
    assert "tokens/s" in capsys.readouterr().out


def test_faults_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "generation", "--model", "random:micro", "--out", str(tmp_path / "g.json"), "--prompts"]
    for flags, message in (
        (["gsm9k"], "did you mean 'gsm8k'"),
        (["gsm8k"], "--data-dir: missing"),
        (["wordproblems", "--top-p", "0"], "--top-p: expected more than 0"),
    ):
        assert main([*words, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
