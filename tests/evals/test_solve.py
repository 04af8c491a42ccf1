"""``mambacus solve`` from flags to record: ours against transformers, sampling, direct answers, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambacus import cli, solve
from mambacus.data.prompts import qa_prompt
from mambacus.runtime.records import read_jsonl, read_record

ITEM_KEYS = {
    "bench", "id", "question", "gold", "prompt", "completion", "extracted", "correct", "reason", "finish_reason",
    "tokens",
}  # fmt: skip


def config(folder: Path, out: Path, **options: Any) -> solve.Config:
    defaults: dict[str, Any] = {"bench": ("wordproblems",), "limit": 4, "max_new_tokens": 12, "device": "cpu"}
    return solve.Config(**(defaults | {"model": str(folder), "out": out} | options))


def items_of(out: Path) -> list[dict[str, Any]]:
    return [item for _, item in read_jsonl(out.with_name(f"{out.stem}.items.jsonl"))]


def test_record_and_items_are_as_documented(checkpoint: Any, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    record = solve.run(config(checkpoint.folder, out, bench=("wordproblems", "aqua"), data_dir=small_data))
    assert (record.kind, record.label) == ("solve", "micro")
    assert read_record(out).results == record.results
    benches = record.results["benches"]
    assert set(benches) == {"wordproblems", "aqua"}
    assert set(benches["wordproblems"]) == {
        "n", "correct", "accuracy", "wilson95", "parse_rate", "truncation_rate", "eos_rate", "generated_tokens",
        "tokens_per_second",
    }  # fmt: skip
    assert benches["wordproblems"]["n"] == 4
    assert benches["wordproblems"]["tokens_per_second"] > 0
    items = items_of(out)
    assert len(items) == 8
    assert all(set(item) >= ITEM_KEYS for item in items)
    assert items[0]["prompt"] == qa_prompt(items[0]["question"])
    assert benches["wordproblems"]["generated_tokens"] == sum(item["tokens"] for item in items[:4])


def test_greedy_completions_are_those_of_transformers(checkpoint: Any, tmp_path: Path, no_network: None) -> None:
    for implementation in ("mambacus", "hf"):
        solve.run(config(checkpoint.folder, tmp_path / f"{implementation}.json", implementation=implementation))
    ours, theirs = items_of(tmp_path / "mambacus.json"), items_of(tmp_path / "hf.json")
    assert any(item["completion"] for item in ours)
    assert ours == theirs


def test_several_samples_give_pass_and_majority(checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    record = solve.run(config(checkpoint.folder, out, samples=3, temperature=1.0, limit=2))
    figures = record.results["benches"]["wordproblems"]
    assert figures["samples"] == 3
    assert set(figures["pass_at"]) == set(figures["maj_at"]) == {"1", "2", "3"}
    items = items_of(out)
    assert [item["sample"] for item in items] == [0, 1, 2, 0, 1, 2]
    assert len({item["completion"] for item in items}) > 2
    again = tmp_path / "s.json"
    solve.run(config(checkpoint.folder, again, samples=3, temperature=1.0, limit=2))
    assert items_of(again) == items


def test_direct_answers_are_asked_for_after_the_mark(checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    solve.run(config(checkpoint.folder, out, style="direct", limit=2))
    assert all(item["prompt"].endswith("\nAnswer: ####") for item in items_of(out))
    assert {item["reason"] for item in items_of(out)} <= {"####", "unparsed"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "random:micro", "--bench", "gsm8"], "--bench: expected one of wordproblems"),
        (["--model", "random:micro", "--bench", "wordproblem"], "did you mean 'wordproblems'"),
        (["--model", "random:micro", "--bench", "gsm8k,gsm8k"], "--bench: gsm8k given more than once"),
        (["--model", "random:micro", "--bench", "gsm8k", "--top-p", "nan"], "--top-p: expected more than 0"),
        (["--model", "random:micro", "--bench", "gsm8k"], "--data-dir"),
        (["--model", "random:micro", "--bench", "wordproblems", "--samples", "4"], "greedy samples are all equal"),
        (["--model", "random:micro", "--bench", "wordproblems", "--limit", "0"], "--limit: expected 1 or more"),
        (["--model", "random:mikro", "--bench", "wordproblems"], "random:SIZE"),
    ],
)
def test_faults_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert cli.main(["solve", *flags, "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mambacus solve: error: ") and message in line
    assert not out.exists()


def test_the_benches_are_those_that_can_be_loaded() -> None:
    from mambacus.evals.math import BENCHES

    assert tuple(BENCHES) == solve.BENCHES


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = tmp_path / "r.items.jsonl"
    items.write_text("{}\n", encoding="utf-8")
    flags = ["--model", "random:micro", "--bench", "wordproblems", "--out", str(tmp_path / "r.json")]
    assert cli.main(["solve", *flags]) == 2
    assert "r.items.jsonl: exists already" in capsys.readouterr().err
    assert items.read_text(encoding="utf-8") == "{}\n"
