"""``mambacus prompt`` from flags to files: search and resume, compile, tune, and the faults in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus import cli, evaluate, prompt_compile, prompt_optimise, prompt_tune, solve
from mambacus.data import wordproblems
from mambacus.inference import Engine, SamplingParams
from mambacus.models import load
from mambacus.models.primed import PrimedModel
from mambacus.models.state_files import read_state, write_state
from mambacus.prompts import DEFAULT, Exemplar, Prompt, read_prompt, write_prompt
from mambacus.prompts.prompt import encode
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_jsonl, read_record

EXEMPLARS = tuple(map(Exemplar.of, wordproblems.generate(8, "train", seed=77)))
PROBLEMS = wordproblems.generate(6, "train", seed=78)
QUESTIONS = [problem.question for problem in wordproblems.generate(12, "test", seed=5)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-shot prompt for ``tiny`` and its state, in one folder."""
    folder = tmp_path_factory.mktemp("compiled")
    write_prompt(folder / "p.yaml", Prompt(instruction="Solve.", exemplars=EXEMPLARS))
    prompt_compile.run(prompt_compile.Config("tiny", folder / "p.yaml", folder / "p.state", device="cpu"))
    return folder


def optimise(folder: Path, **options: Any) -> prompt_optimise.Config:
    values: dict[str, Any] = {
        "items": 4, "fresh": 4, "pool": 5, "population": 4, "rounds": 2, "first": 2, "finalists": 1,
        "random_prompts": 2, "shots": (1, 2), "test_limit": 4, "max_new_tokens": 6, "device": "cpu", "seed": 3,
    }  # fmt: skip
    return prompt_optimise.Config("tiny", "wordproblems", folder / "best.yaml", **(values | options))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("searched")
    prompt_optimise.run(optimise(folder))
    return folder


def test_a_search_ends_with_a_prompt_a_record_and_items(searched: Path) -> None:
    record = read_record(searched / "best.json")
    assert record.kind == "prompt" and record.items_file == "best.items.jsonl"
    prompt = read_prompt(searched / "best.yaml")
    assert prompt.as_dict() == record.results["prompt"]
    search, test = record.results["search"], record.results["test"]
    assert search["tokens"]["naive"] > search["tokens"]["forward"] > 0 and search["ended"] == "rounds"
    assert [rung["items"] for rung in search["rungs"]] == [2, 4, 2, 4]
    assert set(test["prompts"]) == {"default", "fewshot", "optimised", "random"} and test["n"] == 4
    assert test["prompts"]["fewshot"]["prompt"].startswith("2-shot, 'Question: ")
    assert set(test["optimised_against"]) == {"default", "fewshot", "random"}
    items = [item for _, item in read_jsonl(searched / "best.items.jsonl")]
    assert len(items) == 16
    for name, figures in test["prompts"].items():
        mine = [item for item in items if item["rival"] == name]
        assert figures["correct"] == sum(item["correct"] for item in mine)
        assert figures["loglikelihood"] == pytest.approx(sum(item["loglikelihood"] for item in mine) / 4)
        assert figures["loglikelihood"] < -5
    nats = test["optimised_against"]["random"]["loglikelihood"]
    means = {name: figures["loglikelihood"] for name, figures in test["prompts"].items()}
    assert nats["difference"] == pytest.approx(means["optimised"] - means["random"], abs=1e-9)
    assert nats["low"] <= nats["difference"] <= nats["high"]


def test_examples_alone_are_read_for_three_times_fewer_tokens(tmp_path: Path) -> None:
    config = optimise(tmp_path, score="loglikelihood", shots=(6,), pool=8, items=8, first=8, population=6, rounds=1)
    config = dataclasses.replace(config, rounds=2, finalists=1, fresh=2, random_prompts=0)
    search = prompt_optimise.run(config).results["search"]
    assert search["tokens"]["naive"] >= 3 * search["tokens"]["forward"]
    leaders = [lead for rung in search["rungs"] for lead in rung["leaders"]]
    assert all("6-shot" in lead["prompt"] or lead["from"] == "default" for lead in leaders)


def test_a_search_killed_anywhere_comes_to_the_same_end(searched: Path, tmp_path: Path) -> None:
    whole = read_record(searched / "best.json").results
    lines = (searched / "best.journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in (len(lines) // 2, len(lines) - 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "best.journal.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9], encoding="utf-8")
        again = prompt_optimise.run(optimise(folder, resume=True)).results
        for part in ("prompt", "finals", "test"):
            assert _rounded(again[part]) == _rounded(whole[part]), part
        for part in ("search", "finals", "random", "test"):  # nothing is counted twice
            assert again[part]["tokens"] == whole[part]["tokens"], part
        assert (folder / "best.yaml").read_bytes() == (searched / "best.yaml").read_bytes()


@pytest.mark.slow
def test_a_search_killed_by_the_system_comes_to_the_same_end(searched: Path, tmp_path: Path) -> None:
    flags = {
        "items": 4, "fresh": 4, "pool": 5, "population": 4, "rounds": 2, "first": 2, "finalists": 1,
        "random-prompts": 2, "shots": "1,2", "test-limit": 4, "max-new-tokens": 6, "device": "cpu", "seed": 3,
    }  # fmt: skip
    argv = [sys.executable, "-m", "mambacus", "prompt", "optimise", "--model", "tiny", "--bench", "wordproblems"]
    argv += ["--out", str(tmp_path / "best.yaml"), *(f"--{name}={value}" for name, value in flags.items())]
    journal = tmp_path / "best.journal.jsonl"
    killed = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    while killed.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9 and not (tmp_path / "best.yaml").exists()
    again = subprocess.run([*argv, "--resume"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "best.yaml").read_bytes() == (searched / "best.yaml").read_bytes()
    found, whole = (read_record(folder / "best.json").results for folder in (tmp_path, searched))
    for part in ("prompt", "finals", "test"):
        assert _rounded(found[part]) == _rounded(whole[part]), part


def test_proposals_are_asked_for_where_an_endpoint_is_named_and_nowhere_else(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def answer(request: Any, timeout: float) -> Any:
        calls.append(request.full_url)
        message = {"content": json.dumps(["Think of apples."])}
        return io.BytesIO(json.dumps({"choices": [{"message": message}]}).encode())

    def origins(folder: Path) -> list[str]:
        rungs = read_record(folder / "best.json").results["search"]["rungs"]
        return [lead["from"] for rung in rungs for lead in rung["leaders"]]

    monkeypatch.setattr("urllib.request.urlopen", answer)
    named = {"proposer": "http://127.0.0.1:1/v1", "proposer_model": "m"}
    quick = {"fresh": 2, "random_prompts": 0, "test_limit": 2, "score": "loglikelihood"}
    prompt_optimise.run(optimise(tmp_path, **quick, **named))
    assert calls == ["http://127.0.0.1:1/v1/chat/completions"]  # once: in the second of two rounds
    assert "proposed" in origins(tmp_path) and "proposed" not in origins(searched)


def test_a_failing_proposer_is_told_of_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fail(request: Any, timeout: float) -> Any:
        calls.append(request)
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    quick = {"fresh": 2, "random_prompts": 0, "test_limit": 2, "score": "loglikelihood"}
    named = {"proposer": "http://127.0.0.1:1/v1", "proposer_model": "m"}
    first = prompt_optimise.run(optimise(tmp_path, **quick, **named)).results
    assert "warning: --proposer http://127.0.0.1:1/v1/chat/completions: cannot be reached" in capsys.readouterr().err
    again = prompt_optimise.run(optimise(tmp_path, resume=True, **quick, **named)).results
    assert len(calls) == 1 and again["search"] == first["search"]


def _rounded(value: Any) -> Any:
    """Return ``value`` without token counts and with floats to 4 decimals."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "tokens"}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def test_a_compiled_prompt_gives_the_same_text_for_fewer_tokens(compiled: Path) -> None:
    model, tokenizer = load("tiny")
    prompt = read_prompt(compiled / "p.yaml")
    file = read_state(compiled / "p.state", model, tokenizer)
    assert Prompt.from_dict(file.prompt or {}) == prompt
    params = SamplingParams(max_new_tokens=24, stop=prompt.stops)
    plain, forked = Engine(model, tokenizer), Engine(PrimedModel(model, file.state), tokenizer)
    expected = plain.generate([prompt.text(question) for question in QUESTIONS], params)
    assert forked.generate([prompt.framed(question) for question in QUESTIONS], params) == expected
    assert forked.stats.prompt_tokens * 5 <= plain.stats.prompt_tokens
    record = read_record(compiled / "p.state.json")
    assert record.results["prefix_tokens"] == len(file.token_ids) == int(file.state.tokens)
    assert record.results["gate"]["max_logprob_difference"] <= 1e-4


def test_solve_reads_a_fifth_and_answers_the_same(compiled: Path, tmp_path: Path) -> None:
    items, read, saved = {}, {}, {}
    for flag, path in (("prompt", compiled / "p.yaml"), ("state", compiled / "p.state")):
        out = tmp_path / f"{flag}.json"
        options: dict[str, Any] = {flag: path, "limit": 12, "max_new_tokens": 24, "device": "cpu"}
        record = solve.run(solve.Config("tiny", ("wordproblems",), out, **options))
        read[flag] = record.results["prompt_tokens"]
        saved[flag] = record.results.get("prompt_tokens_saved")
        rows = [item for _, item in read_jsonl(tmp_path / f"{flag}.items.jsonl")]
        items[flag] = [(row["id"], row["completion"], row["correct"], row["tokens"]) for row in rows]
    assert items["prompt"] == items["state"] and any(completion for _, completion, _, _ in items["state"])
    _, tokenizer = load("tiny")
    plain = read_prompt(compiled / "p.yaml")
    problems = wordproblems.generate(12, "test", seed=0)
    whole = sum(len(encode(tokenizer, plain.text(problem.question))) for problem in problems)
    prefix = read_record(compiled / "p.state.json").results["prefix_tokens"]
    frame = len(encode(tokenizer, plain.prefix)) - prefix  # its first words, read once in either way
    assert saved == {"prompt": None, "state": 12 * prefix}
    assert read["state"] == whole - 12 * prefix - 11 * frame and read["state"] * 5 <= whole
    assert frame > 0 and read["prompt"] == whole - 11 * (
        prefix + frame
    )  # solve itself reads what its prompts share once


def test_evaluate_after_a_state_is_evaluate_after_its_text(compiled: Path, tmp_path: Path, data_dir: Path) -> None:
    from lm_eval.api.instance import Instance

    from mambacus.evals.catalogue import load_tasks

    preamble = read_prompt(compiled / "p.yaml").preamble
    assert preamble.endswith("\n\n")
    [task], _ = load_tasks(("arc_easy",), data_dir)
    task.build_all_requests(limit=3, rank=0, world_size=1)
    asked = task.instances
    texts = [(preamble + one.args[0], one.args[1]) for one in asked]
    assert all(one.args[0].startswith("Question: ") for one in asked) and len(asked) >= 9
    whole = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
    found = []
    for state, requests in ((compiled / "p.state", asked), (None, whole)):
        config = evaluate.Config("tiny", ("arc_easy",), tmp_path / "e.json", device="cpu", state=state)
        found.append(evaluate._model(config, torch.device("cpu")).loglikelihood(requests))
    for ours, plain in zip(*found, strict=True):
        assert ours[0] == pytest.approx(plain[0], abs=1e-4) and ours[1] == plain[1]


def test_evaluate_takes_a_state(compiled: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in (("plain", {}), ("state", {"state": compiled / "p.state"})):
        config = evaluate.Config("tiny", ("text_sample",), tmp_path / f"{name}.json", device="cpu", limit=1, **options)
        found[name] = evaluate.run(config).results["tasks"]["text_sample"]["word_perplexity"]["value"]
    assert found["plain"] != pytest.approx(found["state"], rel=1e-3)


def test_a_search_compiled_beside_itself_keeps_its_record_and_items(searched: Path, tmp_path: Path) -> None:
    for name in ("best.yaml", "best.json", "best.items.jsonl", "best.journal.jsonl"):
        (tmp_path / name).write_bytes((searched / name).read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = ["--model", "tiny", "--prompt", str(tmp_path / "best.yaml"), "--out", str(tmp_path / "best.state")]
    assert cli.main(["prompt", "compile", *flags, "--device", "cpu"]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert read_record(tmp_path / "best.state.json").kind == "prompt-compile"
    assert read_record(tmp_path / "best.json").kind == "prompt"


def test_a_record_in_the_way_is_refused_before_the_work(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "o.state.json").write_text("{}", encoding="utf-8")
    config = prompt_compile.Config("tiny", compiled / "p.yaml", tmp_path / "o.state", device="cpu")
    with pytest.raises(UserError, match=r"o.state.json: exists already"):
        prompt_compile.run(config)
    assert not (tmp_path / "o.state").exists()


def test_the_default_prompt_compiles_to_a_state_of_nothing(tmp_path: Path) -> None:
    write_prompt(tmp_path / "d.yaml", DEFAULT)
    prompt_compile.run(prompt_compile.Config("tiny", tmp_path / "d.yaml", tmp_path / "d.state", device="cpu"))
    model, tokenizer = load("tiny")
    file = read_state(tmp_path / "d.state", model, tokenizer)
    assert file.token_ids == () and not file.state.ssm_state.any() and not file.state.conv_state.any()
    plain, begun = Engine(model, tokenizer), Engine(PrimedModel(model, file.state), tokenizer)
    texts, params = [DEFAULT.text(QUESTIONS[0])], SamplingParams(max_new_tokens=12)
    assert plain.generate(texts, params) == begun.generate(texts, params)


def test_a_state_of_other_weights_says_so(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "tiny", "--state", str(compiled / "p.state"), "--device", "cpu", "--weights", "int8"]
    assert (
        cli.main(["solve", *flags, "--bench", "wordproblems", "--limit", "1", "--out", str(tmp_path / "o.json")]) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "read with plain weights, the model's are quantised (--weights)" in error


def test_a_search_that_a_budget_ended_goes_on_with_a_larger_one(searched: Path, tmp_path: Path) -> None:
    whole = read_record(searched / "best.json").results
    spent = whole["search"]["tokens"]["forward"]
    cut = prompt_optimise.run(optimise(tmp_path, budget=spent * 2 // 3)).results["search"]
    assert cut["ended"] == "budget" and cut["tokens"]["forward"] <= spent * 2 // 3
    more = prompt_optimise.run(optimise(tmp_path, budget=spent * 2, resume=True)).results
    assert more["search"]["ended"] == "rounds" and more["search"]["tokens"] == whole["search"]["tokens"]
    assert more["prompt"] == whole["prompt"]


def test_finalists_are_counted_without_the_default(searched: Path) -> None:
    finals = read_record(searched / "best.json").results["finals"]
    assert len(finals["candidates"]) == 2  # --finalists 1, and the default


def test_a_tuning_knows_its_rows_and_its_state(compiled: Path, tmp_path: Path) -> None:
    rows = [{"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"} for p in PROBLEMS]
    data, state = tmp_path / "d.jsonl", tmp_path / "s.state"
    state.write_bytes((compiled / "p.state").read_bytes())

    def tune() -> None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = prompt_tune.Config("tiny", state, str(data), tmp_path / "t", held_out=2, max_steps=1, device="cpu")
        prompt_tune.run(dataclasses.replace(config, resume=(tmp_path / "t").exists()))

    tune()
    tune()  # the same run: its record is returned
    rows[0], rows[1] = rows[1], rows[0]
    with pytest.raises(UserError, match="differs in data"):
        tune()
    rows[0], rows[1] = rows[1], rows[0]
    model, tokenizer = load("tiny")
    file = read_state(state, model, tokenizer)
    file.state.ssm_state[0, 0, 0, 0] += 1
    write_state(state, file, model, tokenizer)
    with pytest.raises(UserError, match="differs in from"):
        tune()


@pytest.mark.parametrize("verb", ["solve", "evaluate", "generate"])
def test_states_that_do_not_fit_are_refused_by_every_verb(
    verb: str, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "solve": ["--bench", "wordproblems", "--limit", "1", "--out", str(tmp_path / "o.json")],
        "evaluate": ["--tasks", "text_sample", "--limit", "1", "--out", str(tmp_path / "o.json")],
        "generate": ["--prompt", "A"],
    }[verb]
    cut = tmp_path / "cut.state"
    cut.write_bytes((compiled / "p.state").read_bytes()[:-100])
    for model, path, message in (
        ("random:tiny", compiled / "p.state", "random:tiny"),
        ("tiny", cut, "not a readable safetensors file"),
        ("tiny", tmp_path / "none.state", "none.state"),
    ):
        assert cli.main([verb, "--model", model, "--state", str(path), "--device", "cpu", *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"mambacus {verb}: error: ") and message in error and path.name in error
    assert not (tmp_path / "o.json").exists()


def test_loglikelihoods_after_the_state_are_those_after_the_prompt(compiled: Path) -> None:
    model, tokenizer = load("tiny")
    prompt = read_prompt(compiled / "p.yaml")
    state = read_state(compiled / "p.state", model, tokenizer).state
    for problem in wordproblems.generate(6, "test", seed=6):
        gold = tokenizer(f" {problem.solution}", add_special_tokens=False)["input_ids"]
        found = []
        for reader, text in ((model, prompt.text), (PrimedModel(model, state), prompt.framed)):
            ids = tokenizer(text(problem.question), add_special_tokens=False)["input_ids"] + gold
            with torch.no_grad():
                logits = reader(input_ids=torch.tensor([ids])).logits[0, -len(gold) - 1 : -1].double()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(gold)[:, None]).squeeze(1))
        # In nats a token; a single improbable token differs by up to 2e-5, the rounding of its float32 logit.
        assert abs(found[0].mean() - found[1].mean()) <= 1e-5
        assert (found[0] - found[1]).abs().max() <= 1e-4


def test_tuning_lowers_the_held_out_loss_and_touches_the_state_alone(compiled: Path, tmp_path: Path) -> None:
    config = prompt_tune.Config(
        "tiny", compiled / "p.state", "wordproblems:72", tmp_path / "t", max_steps=12, batch_size=8, held_out=8,
        device="cpu",
    )  # fmt: skip
    results = prompt_tune.run(config).results
    assert results["held_out"]["loss_after"] < results["held_out"]["loss_before"] - 0.05
    model, tokenizer = load("tiny")
    tuned = read_state(tmp_path / "t" / "prompt.state", model, tokenizer)  # the model is the one it was
    start = read_state(compiled / "p.state", model, tokenizer)
    assert tuned.prompt == start.prompt and tuned.token_ids == start.token_ids
    assert results["parameters"]["trainable"] == start.state.conv_state.numel() + start.state.ssm_state.numel()
    assert (tuned.state.ssm_state != start.state.ssm_state).any()


def test_tuning_with_an_offset_leaves_an_adapter_that_fits_its_state(compiled: Path, tmp_path: Path) -> None:
    config = prompt_tune.Config(
        "tiny", compiled / "p.state", "wordproblems:20", tmp_path / "t", max_steps=3, batch_size=4, held_out=4,
        offset=True, device="cpu",
    )  # fmt: skip
    results = prompt_tune.run(config).results
    model, tokenizer = load("tiny", adapter=tmp_path / "t" / "adapter")
    file = read_state(tmp_path / "t" / "prompt.state", model, tokenizer)
    from mambacus.tuning.data import Example, encode

    asked = Prompt.from_dict(file.prompt or {})
    rows = wordproblems.generate(20, "train", seed=0)[-4:]
    kept_out, _ = encode([Example(asked.framed(p.question), f" {p.solution}") for p in rows], tokenizer, max_length=999)
    loss = prompt_tune._loss(PrimedModel(model, file.state), kept_out, 4)
    assert loss == pytest.approx(results["held_out"]["loss_after"], abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected one of optimise, compile, tune"),
        (["optimize"], "unknown action 'optimize'"),
        (["optimise", "--model", "tiny", "--bench", "wordproblem", "--out", "o.yaml"], "wordproblem"),
        (["optimise", "--model", "tiny", "--bench", "svamp", "--out", "o.yaml"], "svamp has no training split"),
        (["optimise", "--model", "tiny", "--bench", "gsm8k", "--out", "o.yaml"], "--data-dir"),
        (["optimise", "--model", "tiny", "--bench", "wordproblems", "--out", "o.json"], "ending in .yaml"),
        (["optimise", "--model", "tiny", "--bench", "wordproblems", "--out", "o.yaml", "--first", "99"], "--first 99"),
        (
            ["optimise", "--model", "tiny", "--bench", "wordproblems", "--out", "o.yaml", "--budget", "9"],
            "--budget 9: too few tokens",
        ),
        (
            ["optimise", "--model", "tiny", "--bench", "wordproblems", "--out", "o.yaml", "--proposer", "http://x"],
            "expected --proposer-model",
        ),
        (
            [
                "optimise",
                "--model",
                "tiny",
                "--bench",
                "wordproblems",
                "--out",
                "o.yaml",
                "--shots",
                "9",
                "--pool",
                "8",
            ],
            "--shots 9: expected at most --pool, 8",
        ),
        (["optimise", "--model", "tiny", "--bench", "wordproblems", "--out", "o.yaml", "--space", "none"], "none"),
        (
            [
                "optimise",
                "--model",
                "tiny",
                "--bench",
                "wordproblems",
                "--out",
                "o.yaml",
                "--proposer",
                "file:///etc/x",
            ],
            "begins with http",
        ),
        (["compile", "--model", "tiny", "--prompt", "none.yaml", "--out", "o.state"], "none.yaml"),
        (["tune", "--model", "tiny", "--state", "none.state", "--data", "wordproblems:9", "--out", "o"], "none.state"),
    ],
)
def test_faults_are_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prompt", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mambacus prompt: error: ") and message in error
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".jsonl"]


def test_nothing_is_overwritten(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.yaml").write_text("question: '{question}'\n", encoding="utf-8")
    flags = ["--model", "tiny", "--bench", "wordproblems", "--out", str(tmp_path / "best.yaml")]
    assert cli.main(["prompt", "optimise", *flags]) == 2
    flags = ["--model", "tiny", "--prompt", str(compiled / "p.yaml"), "--out", str(compiled / "p.state")]
    assert cli.main(["prompt", "compile", *flags]) == 2
    assert capsys.readouterr().err.count("exists already; add --overwrite") == 2


def test_the_prompt_file_says_what_the_test_found(tmp_path: Path) -> None:
    prompt_optimise.run(optimise(tmp_path, rounds=1, random_prompts=0, population=2, test_limit=3))
    head = (tmp_path / "best.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert head[0] == "# mambacus prompt optimise: tiny on wordproblems" and head[1].startswith("# test, 3 problems:")
    assert json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))["results"]["random"] == {}
    assert DEFAULT.prefix == "Question:"
