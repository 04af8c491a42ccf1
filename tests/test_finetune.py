"""``mambacus finetune`` from the command line: what it leaves, what it refuses, and a real kill."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mambacus import finetune, finetune_check
from mambacus.cli import main
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, read_record

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "base_signature.json"}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sums as JSONL."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    sums = [(a, b) for a in (2, 13) for b in (3, 4, 15, 40)]
    lines = [{"question": f"{a} + {b}?", "answer": str(a + b), "solution": f"{a} + {b} = {a + b}"} for a, b in sums]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(rows: Path, tmp_path: Path) -> Callable[..., finetune.Config]:
    """A short run on a random model."""

    def make(**changes: object) -> finetune.Config:
        settings = {
            "model": "random:micro", "data": str(rows), "out": tmp_path / "run", "max_steps": 3, "batch_size": 4,
            "device": "cpu", "dtype": "float32", "save_every": 2, "check": 0,
        }  # fmt: skip
        return finetune.Config(**(settings | changes))  # type: ignore[arg-type]

    return make


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_record(record: Record, steps: int) -> None:
    results = record.results
    assert record.kind == "finetune"
    train = results["train"]
    assert train["steps"] == steps == len(results["history"])
    assert all(train[key] > 0 for key in ("tokens", "seconds", "tokens_per_second", "peak_memory_bytes"))
    assert train["peak_memory_of"] in ("steps", "process")
    assert train["loss_first"] == results["history"][0]["loss"]
    assert train["loss_last"] == results["history"][-1]["loss"] < train["loss_first"]
    assert results["data"]["rows"] == results["data"]["kept"] == 8
    assert results["data"]["dropped"] == {}
    assert 0.9 < results["data"]["packing_efficiency"] <= 1


def test_lora_leaves_an_adapter_and_a_record(config: Callable[..., finetune.Config], tmp_path: Path) -> None:
    finetune.run(config())
    out = tmp_path / "run"
    assert files(out) == {"adapter", "checkpoints", "left_out.jsonl", "record.json", "run.json", "tensorboard"}
    assert files(out / "adapter") == ADAPTER_FILES
    assert files(out / "checkpoints") == {"checkpoint-2", "checkpoint-3"}
    record = read_record(out / "record.json")
    check_record(record, 3)
    parameters = record.results["parameters"]
    assert parameters["targets"] == ["in_proj", "out_proj"]
    assert 0 < parameters["trainable"] < parameters["total"]
    assert record.results["learning_rate"] == 1e-3

    from mambacus.models import load

    model, _ = load("random:micro", adapter=out / "adapter")
    base, _ = load("random:micro")
    ids = torch.arange(20)[None]
    assert not torch.equal(model(input_ids=ids).logits, base(ids).logits)


def test_full_leaves_a_model(config: Callable[..., finetune.Config], tmp_path: Path) -> None:
    from mambacus.models import load

    record = finetune.run(config(method="full", grad_accum=2, pack_length=0))
    check_record(record, 3)
    parameters = record.results["parameters"]
    assert parameters["trainable"] == parameters["total"]
    model, tokenizer = load(tmp_path / "run" / "model")
    assert tokenizer.eos_token_id == 0
    assert model.dtype == torch.float32


def test_the_same_run_twice_is_the_same_and_another_seed_is_not(
    config: Callable[..., finetune.Config], tmp_path: Path
) -> None:
    def weights(name: str, seed: int) -> bytes:
        finetune.run(config(out=tmp_path / name, seed=seed))
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    first = weights("a", 0)
    assert first == weights("b", 0)
    assert first != weights("c", 1)


def test_an_occupied_folder_is_left_alone(config: Callable[..., finetune.Config], tmp_path: Path) -> None:
    first = finetune.run(config(max_steps=1))
    record = (tmp_path / "run" / "record.json").read_bytes()
    with pytest.raises(UserError, match="holds this run already; add --resume"):
        finetune.run(config(max_steps=1))
    with pytest.raises(UserError, match=r"holds another run \(differs in rank\)"):
        finetune.run(config(max_steps=1, rank=2, resume=True))
    assert (tmp_path / "run" / "record.json").read_bytes() == record
    again = finetune.run(config(max_steps=1, resume=True))
    assert again.results == first.results
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a mambacus run"):
        finetune.run(config(out=tmp_path / "other"))
    assert files(tmp_path / "other") == {"letter.txt"}


def test_changed_data_is_another_run(config: Callable[..., finetune.Config], rows: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows.read_text())
    finetune.run(config(data=str(copy), max_steps=1))
    copy.write_text(rows.read_text().replace("13 + 3?", "13 plus 3?"))
    with pytest.raises(UserError, match=r"differs in data"):
        finetune.run(config(data=str(copy), max_steps=1, resume=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--data", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--targets", "in_porj"], "did you mean 'in_proj'"),
        (["--dtype", "float16"], "refused"),
        (["--dtype", "int8"], "expected auto, float32 or bfloat16"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (
            ["--batch-size", "0", "--rank", "-1"],
            "--batch-size: expected 1 or more, got 0; --rank: expected 1 or more, got -1",
        ),
        (["--grad-accum", "8"], "--grad-accum 8: more parts than --batch-size 4"),
        (["--pack-length", "9"], "--pack-length 9: shorter than --max-length 1024"),
        (["--dropout", "1"], "--dropout"),
        (["--lr", "-1"], "--lr: expected 0 or more"),
        (["--lr", "nan"], "--lr: expected 0 or more, got nan"),
        (["--epochs", "inf"], "--epochs: expected more than 0, got inf"),
        (["--alpha", "0"], "--alpha: expected more than 0"),
        (["--seed", "-1"], "--seed: expected 0 or more and at most 4294967295"),
        (["--seed", "9" * 30], "--seed: expected 0 or more and at most 4294967295"),
        (["--out", "{file}/run"], "is a file, not a folder"),
        (["--max-steps", "0", "--epochs", "0"], "--epochs"),
        (["--max-length", "10"], "all 8 rows are longer"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    rows: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "random:micro", "--data", str(rows), "--batch-size", "4", "--device", "cpu"]
    given += ["--max-steps", "1", "--out", str(tmp_path / "run")]
    flags = [flag.format(file=rows) for flag in flags]
    assert main(["finetune", *given, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mambacus finetune: error: ")
    assert "\n" not in error
    assert words in error
    assert not (tmp_path / "run").exists()


def test_a_yaml_file_sets_what_flags_do_not(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(
        f"model: random:micro\ndata: {rows}\nmax-steps: 9\nbatch_size: 4\ntargets: [in_proj]\n"
    )
    flags = [
        "-c",
        str(tmp_path / "c.yaml"),
        "--max-steps",
        "1",
        "--device",
        "cpu",
        "--check",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["finetune", *flags]) == 0
    record = read_record(tmp_path / "run" / "record.json")
    assert record.config["max_steps"] == record.results["train"]["steps"] == 1
    assert record.results["parameters"]["targets"] == ["in_proj"]
    assert "1 steps, loss" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_adapter(config: Callable[..., finetune.Config], tmp_path: Path) -> None:
    """SIGKILL, at whatever moment it comes after a random checkpoint, then ``--resume``."""
    steps = 40
    settings = {"max_steps": steps, "save_every": 1, "dropout": 0.3}
    finetune.run(config(out=tmp_path / "whole", **settings))
    expected = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()

    out = tmp_path / "killed"
    plain = config(out=out, **settings)
    flags = [
        f"--{name.replace('_', '-')}={getattr(plain, name)}"
        for name in (
            "model",
            "data",
            "out",
            "max_steps",
            "batch_size",
            "device",
            "dtype",
            "save_every",
            "dropout",
            "check",
        )
    ]
    threads = str(torch.get_num_threads())  # sums in another order would differ in the last bit
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, "-m", "mambacus", "finetune", *flags], env=environment, stdout=subprocess.DEVNULL
    )
    wanted, delay = random.randint(1, steps // 4), random.random() * 0.05  # far from the end
    try:
        while process.poll() is None and not (out / "checkpoints" / f"checkpoint-{wanted}").exists():
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
    where = f"killed {delay:.3f} s after checkpoint {wanted}"
    assert process.wait() == -signal.SIGKILL, where
    assert not (out / "adapter").exists(), where

    record = finetune.run(config(out=out, resume=True, **settings))
    assert wanted <= record.results["train"]["resumed_from_step"] < steps, where
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected, where
    assert record.results["history"] == read_record(tmp_path / "whole" / "record.json").results["history"], where


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [3, 200])
def test_kills_at_random_moments_lose_no_checkpoint(
    config: Callable[..., finetune.Config], tmp_path: Path, kills: int
) -> None:
    """SIGKILL after a random time, again and again: what was whole stays whole, the end is that of a run in peace."""
    import multiprocessing

    from mambacus.tuning.checkpoints import newest_checkpoint

    settings = {"max_steps": 30, "save_every": 1, "dropout": 0.3}
    finetune.run(config(out=tmp_path / "peace", **settings))
    expected = (tmp_path / "peace" / "adapter" / "adapter_model.safetensors").read_bytes()
    context = multiprocessing.get_context("forkserver")  # a server that has imported torch makes each start quick
    context.set_forkserver_preload(["mambacus.tuning.trainer", "mambacus.tuning.prepare", "mambacus.models", "peft"])
    chance = random.Random(0)
    killed = rounds = 0

    def step_of(checkpoint: Path | None) -> int:
        return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    while killed < kills:
        rounds += 1
        out = tmp_path / f"round{rounds}"
        while killed < kills and not (out / "record.json").exists():
            process = context.Process(target=finetune.run, args=(config(out=out, resume=True, **settings),))
            process.start()
            process.join(chance.uniform(0.0, 4.0))
            seen = step_of(newest_checkpoint(out / "checkpoints"))
            if process.is_alive():
                process.kill()
                killed += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), f"seed 0, kill {killed}"
            assert step_of(newest_checkpoint(out / "checkpoints")) >= seen, f"seed 0, kill {killed}"
        finetune.run(config(out=out, resume=True, **settings))
        assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected, f"seed 0, round {rounds}"


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(
    config: Callable[..., finetune.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.tuning import checkpoints, trainer

    save_file, out = trainer.save_file, tmp_path / "run"

    def full(tensors: object, path: Path) -> None:
        if (out / "checkpoints" / "checkpoint-2").exists():
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(UserError, match=r"step 3: .*No space left on device; the last good one is .*checkpoint-2"):
        finetune.run(config())
    assert files(out / "checkpoints") == {"checkpoint-2"}
    assert checkpoints.newest_checkpoint(out / "checkpoints") == out / "checkpoints" / "checkpoint-2"
    monkeypatch.setattr(trainer, "save_file", save_file)
    record = finetune.run(config(resume=True))
    assert record.results["train"]["resumed_from_step"] == 2
    assert files(out / "adapter") == ADAPTER_FILES


@pytest.mark.slow
def test_a_run_ends_with_its_gain_and_its_cost(
    config: Callable[..., finetune.Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = finetune.run(config(data="wordproblems:8", check=2, max_steps=1))
    found = record.results["check"]
    assert found.keys() == {"answer_loss:wordproblems", "accuracy:wordproblems", "text"}
    for figures in found.values():
        assert figures["low95"] <= figures["change"] <= figures["high95"] and figures["n"] == 2
        assert figures["change"] == pytest.approx(figures["after"] - figures["before"])
    assert found["answer_loss:wordproblems"]["better"] == "lower"
    from mambacus.finetune_check import summary

    assert len(summary(found)) == 3 and all(" -> " in line for line in summary(found))


def test_the_base_is_asked_again_when_the_questions_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(model: object, tokenizer: object, questions: finetune_check.Questions) -> finetune_check.Answers:
        asked.append(questions)
        return {"accuracy:x": [[float(len(asked))]]}

    monkeypatch.setattr(finetune_check, "ask", ask)
    monkeypatch.setattr("mambacus.models.load", lambda *args, **settings: (None, None))
    data = tmp_path / "data"
    first = finetune_check.Questions("gsm8k", 2, data)

    def answers(questions: finetune_check.Questions) -> float:
        found = finetune_check.answers_of_base(tmp_path, "tiny", torch.device("cpu"), questions)
        return found["accuracy:x"][0][0]

    assert [answers(first), answers(first)] == [1, 1]
    for change in ({"count": 3}, {"bench": "svamp"}, {"data_dir": None}):
        questions = dataclasses.replace(first, **change)  # type: ignore[arg-type]
        before = len(asked)
        assert [answers(questions), answers(questions)] == [before + 1] * 2, change
    (data / "zeroshot").mkdir(parents=True)
    assert answers(first) == 5
    (data / "zeroshot" / "arc_easy").mkdir()
    assert answers(first) == 6  # one task more to ask


def test_the_verdict_follows_the_interval() -> None:
    from mambacus.finetune_check import compare, summary

    right, wrong = [[1.0]] * 20, [[0.0]] * 20
    before = {"accuracy:x": wrong, "task:y": right, "text": [[-100.0, 20.0]] * 10}
    found = compare(before, {**before, "accuracy:x": right, "task:y": wrong})
    verdicts = [line.rpartition(": ")[2] for line in summary(found)]
    assert verdicts == ["gain", "cost", "no sure change"]


@pytest.mark.parametrize("shape", ["uniform", "lognormal"])
def test_rows_grow_until_nearly_all_tokens_of_long_samples_are_real(
    config: Callable[..., finetune.Config], capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    from mambacus.tuning.data import Sample
    from mambacus.tuning.methods import METHODS
    from mambacus.tuning.packing import plan
    from mambacus.tuning.prepare import Prepared

    random = np.random.default_rng(0)
    drawn = {"uniform": random.integers(1100, 2048, 512), "lognormal": random.lognormal(6.4, 0.7, 512).clip(20, 2047)}
    samples = [Sample(np.zeros(int(length), dtype=np.int32), 1) for length in drawn[shape]]
    prepared = Prepared(samples, [*map(len, samples)], {}, "", 0, [])
    settings = {"epochs": 1.0, "max_steps": 0, "batch_size": 32}
    chosen = finetune._batches(config(**settings), METHODS["lora"], prepared).plan
    fixed = plan(prepared.lengths, epochs=1, batch_size=32, grad_accum=1, capacity=2048, seed=0)
    assert fixed.efficiency < 0.97 <= chosen.efficiency
    assert chosen.computed_tokens < fixed.computed_tokens
    for one, other in zip(chosen.micro_batches, fixed.micro_batches, strict=True):  # the same samples make a step
        assert sorted(itertools.chain(*one)) == sorted(itertools.chain(*other))
    for layout, said in ((chosen, False), (fixed, True)):
        counts = {"dropped": {}, "split": 0, "kept": 512, "rows": 512, "duplicates": 0, "tokens": 1}
        finetune._announce(config(), {"trainable": 1, "total": 2, "targets": []}, counts, layout, 0.1)
        assert ("of the computed tokens are real" in capsys.readouterr().out) is said


@pytest.mark.slow
def test_a_sweep_compares_every_combination(
    config: Callable[..., finetune.Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("method=lora|bitfit", "seed=0|1")
    record = finetune.run(config(out=tmp_path / "grid", sweep=words, max_steps=2))
    assert record.kind == "sweep" and record.results["axes"] == ["method", "seed"]
    points = [(row["method"], row["seed"]) for row in record.results["runs"]]
    assert points == [("lora", 0), ("lora", 1), ("bitfit", 0), ("bitfit", 1)]
    for row in record.results["runs"]:
        alone = read_record(tmp_path / "grid" / row["folder"] / "record.json")
        assert alone.results["train"]["loss_last"] == row["loss_last"]
    again = finetune.run(config(out=tmp_path / "grid", sweep=words, max_steps=2))
    assert again.results["runs"] == record.results["runs"]
    for wrong, fault in (("out=a|b", "out is the same"), ("lr=fast", "expected float"), ("methd=x", "unknown key")):
        with pytest.raises(UserError, match=fault):
            finetune.run(config(out=tmp_path / "other", sweep=(wrong,)))


def test_a_sweep_is_checked_whole_before_the_first_step(
    config: Callable[..., finetune.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambacus.tuning.trainer.train", lambda *a, **k: pytest.fail("a run began"))
    words = ("method=lora|loro|bitfit", "dtype=auto|float16", "grad_accum=1|99", "options=alpha=8|r=8")
    with pytest.raises(UserError) as error:
        finetune.run(config(out=tmp_path / "grid", sweep=words))
    said = str(error.value)
    for fault in ("got 'loro'; did you mean", "float16: refused", "more parts than --batch-size", "no key 'alpha'"):
        assert fault in said, fault
    with pytest.raises(UserError, match=r"cannot read gone\.jsonl"):
        finetune.run(config(out=tmp_path / "grid", sweep=("data=wordproblems:9|gone.jsonl", "seed=0|1")))
    assert "\n" not in said and not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("seed=0", "seed=1"), "seed stands twice; give its values as seed=VALUE|VALUE"),
        (("batch-size=4", "batch_size=8"), "batch_size stands twice"),
        (("seed=0|1|0",), "seed: 0 stands twice (| separates values"),
        (("lr=1e-3|0.001",), "lr: 0.001 stands twice"),
        (("targets=in_proj|in!proj|in%proj",), "two runs would share the folder"),
    ],
)
def test_a_grid_that_would_lose_a_run_is_refused(
    config: Callable[..., finetune.Config], tmp_path: Path, words: tuple[str, ...], fault: str
) -> None:
    with pytest.raises(UserError) as error:
        finetune.run(config(out=tmp_path / "grid", sweep=words))
    assert fault in str(error.value) and not (tmp_path / "grid").exists()


def test_a_sweep_keeps_nothing_of_a_run_while_the_next_one_trains(
    config: Callable[..., finetune.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.finetune_sweep import sweep
    from mambacus.tuning import trainer

    made: list[weakref.ref[object]] = []

    def remember(self: trainer.MambaTrainer, model: torch.nn.Module, *rest: object) -> None:
        plain(self, model, *rest)
        made.extend((weakref.ref(self), weakref.ref(model), *map(weakref.ref, model.parameters())))

    def run(one: finetune.Config) -> Record:
        assert [ref() for ref in made] == [None] * len(made)
        began = len(made)
        record = finetune.run(one)
        assert len(made) > began + 2
        return record

    plain = trainer.MambaTrainer.__init__
    monkeypatch.setattr(trainer.MambaTrainer, "__init__", remember)
    gc.disable()  # what is freed is freed by the sweep, not by chance
    try:
        sweep(
            config(out=tmp_path / "grid", sweep=("method=lora|pissa|affix|full",), max_steps=2),
            run,
            finetune.check_early,
        )
        assert [ref() for ref in made] == [None] * len(made)
    finally:
        gc.enable()


def test_finished_runs_are_collected_into_one_record_with_their_own_environment(
    config: Callable[..., finetune.Config], tmp_path: Path
) -> None:
    grid = tmp_path / "grid"
    words = ("method=lora|bitfit", "seed=0|1")
    for seed in (0, 1):
        finetune.run(config(out=grid, sweep=(words[0], f"seed={seed}"), max_steps=2))
    (grid / "record.json").unlink()
    for folder in grid.iterdir():  # as if only the records had been brought from another machine
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        edit(folder / "record.json", ("environment", "gpu"), "a GPU")
    collecting = config(out=grid, sweep=words, max_steps=2, collect=True)
    record = finetune.run(collecting)
    assert read_record(grid / "record.json") == record
    runs = record.results["runs"]
    assert [(row["method"], row["seed"]) for row in runs] == [("lora", 0), ("lora", 1), ("bitfit", 0), ("bitfit", 1)]
    for row in runs:
        alone = read_record(grid / row["folder"] / "record.json")
        train = alone.results["train"]
        assert all(row[key] == train[key] for key in ("steps", "loss_last", "seconds", "peak_memory_bytes"))
        assert row["peak_memory_of"] == train["peak_memory_of"]
        assert record.environment == alone.environment
    assert record.environment["gpu"] == "a GPU" and record.results["one_at_a_time"] is True

    at_once = grid / "method-lora_seed-1" / "record.json"
    edit(at_once, ("started_at",), read_record(grid / "method-lora_seed-0" / "record.json").started_at)
    edit(at_once, ("seconds",), 60.0)
    assert finetune.run(collecting).results["one_at_a_time"] is False

    edit(at_once, ("environment", "gpu"), "another GPU")
    edit(grid / "method-bitfit_seed-0" / "record.json", ("config", "batch_size"), 8)
    (grid / "method-bitfit_seed-1" / "record.json").unlink()
    with pytest.raises(UserError) as refused:
        finetune.run(collecting)
    assert str(refused.value) == (
        "--collect: method-lora_seed-1: another environment than method-lora_seed-0; "
        "method-bitfit_seed-0: batch_size is 8, asked for 4; method-bitfit_seed-1: no record"
    )
    with pytest.raises(UserError, match="--collect: needs the grid"):
        finetune.run(config(collect=True))


def edit(path: Path, keys: tuple[str, ...], value: object) -> None:
    """Set one value of a JSON file."""
    raw = json.loads(path.read_text())
    place = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(raw))
