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
    "tokens", "error", "equations",
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
        "tokens_per_second", "errors",
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


class Scripted:
    """An engine that answers with what it is told."""

    batch_size = 4

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def generate(self, prompts: Any, params: Any, state: Any = None, *, progress: Any = None) -> Any:
        from mambacus.inference import Completion

        assert params.stop == ("```", "\nQuestion:", "\n\nQuestion")
        assert all(prompt.endswith("\nAnswer: ```python\n") for prompt in prompts)
        return [[Completion(self.texts.pop(0), [1], "stop")] for _ in prompts]


def test_programs_are_run_and_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambacus.evals.math import load_problems

    problems = load_problems("wordproblems", None, 4, 0)
    by_length = sorted(problems, key=lambda problem: -len(problem.question))
    endings = ["print({})", "answer = {} + 1", "open('/etc/passwd')", "x = 1"]
    texts = [ending.format(problem.answer) for ending, problem in zip(endings, by_length, strict=True)]
    monkeypatch.setattr(solve, "_engine", lambda config: Scripted(texts))
    record = solve.run(config(Path("tiny"), tmp_path / "r.json", style="program", limit=4))
    found = {item["id"]: item for item in items_of(tmp_path / "r.json")}
    ours = [found[problem.id] for problem in by_length]
    assert [item["correct"] for item in ours] == [True, False, False, False]
    assert [item["error"] for item in ours] == [None, "set-up", "program: forbidden", "program: no answer"]
    assert ours[2]["reason"] == "program: forbidden (open /etc/passwd)"
    assert record.results["benches"]["wordproblems"]["errors"] == {
        "set-up": 1, "program: forbidden": 1, "program: no answer": 1,
    }  # fmt: skip


def test_worked_examples_are_read_once(checkpoint: Any, small_data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bench": ("svamp",), "limit": 6, "num_fewshot": 3, "data_dir": small_data}
    for implementation in ("mambacus", "hf"):
        out = tmp_path / f"{implementation}.json"
        solve.run(config(checkpoint.folder, out, implementation=implementation, **options))
    ours, theirs = items_of(tmp_path / "mambacus.json"), items_of(tmp_path / "hf.json")
    assert ours == theirs
    assert ours[0]["prompt"].count("Question: ") == 4


def test_sampling_reads_every_problem_once(checkpoint: Any) -> None:
    from mambacus.evals.cache import CompletionCache
    from mambacus.evals.generation import solve as complete
    from mambacus.inference import Engine, SamplingParams

    engine = Engine(checkpoint.model, checkpoint.tokenizer, batch_size=4)
    examples, prompts = "Question: 1\nAnswer: 1\n\n" * 5, [f"Question: {n} + 1\nAnswer:" for n in range(7)]
    params = SamplingParams(max_new_tokens=3, temperature=1.0, n=6)
    complete(engine, prompts, examples, params, CompletionCache(None))
    shared = len(engine.encode(examples.rstrip()))
    whole = sum(len(engine.encode(examples + prompt)) for prompt in prompts)
    assert engine.stats.prompt_tokens == whole - (len(prompts) - 1) * shared


def test_an_interrupted_run_goes_on_where_it_was(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.evals import generation
    from mambacus.inference import Engine

    monkeypatch.setattr(generation, "BATCHES_PER_CALL", 1)
    options: dict[str, Any] = {"limit": 6, "batch_size": 2, "samples": 2, "temperature": 1.0, "cache": tmp_path / "c"}
    plain = tmp_path / "a.json"
    solve.run(config(checkpoint.folder, plain, **options | {"cache": None}))
    generate = Engine.generate
    calls = []

    def interrupted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **named)

    monkeypatch.setattr(Engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        solve.run(config(checkpoint.folder, tmp_path / "b.json", **options))
    monkeypatch.setattr(Engine, "generate", generate)
    record = solve.run(config(checkpoint.folder, tmp_path / "b.json", **options))
    assert items_of(tmp_path / "b.json") == items_of(plain)
    assert record.results["benches"]["wordproblems"]["from_cache"] == 3
    assert record.results["benches"]["wordproblems"]["tokens_per_second"] is None


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
