"""Pre-training: batches, schedule, loss, resume, what is measured, and the whole command on a small corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mambacus import pretrain
from mambacus.data import corpus
from mambacus.data.sources import TEXT_FILES
from mambacus.data.tokenizer import EOS_ID, PAD_ID, train_tokenizer
from mambacus.models import MambaConfig, MambaLM, load, registry
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record
from mambacus.tuning.pretraining import (
    CHECKPOINT,
    Mixture,
    Plan,
    Pretraining,
    perplexity,
    rate_factor,
    split_windows,
    stream_loss,
    sums_right,
)

CPU = torch.device("cpu")
SHAPE = MambaConfig(d_model=16, n_layer=2, vocab_size=40, d_state=4)


def small_model(seed: int = 0) -> MambaLM:
    model = registry.random_model(SHAPE, seed)
    model.set_backend("reference")
    return model


def stream(n: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, 40, n).astype(np.uint16)
    tokens[0] = EOS_ID
    return tokens


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "steps": 6, "max_minutes": 0.0, "batch": 3, "seqlen": 12, "learning_rate": 1e-2, "weight_decay": 0.1,
        "warmup": 0.2, "decay": 0.5, "clip": 1.0, "weights": {"a": 1.0}, "seed": 0, "log_every": 2, "save_every": 100,
    }  # fmt: skip
    return Plan(**(values | changes))


def training(folder: Path, **changes: Any) -> Pretraining:
    mixture = Mixture({"a": stream(500)}, {"a": 1.0}, 12, EOS_ID, CPU)
    return Pretraining(small_model(), mixture, plan(**changes), folder)


# Batches and schedule


def test_windows_come_from_the_streams_by_weight() -> None:
    streams = {"low": stream(300) % 10, "high": stream(900) % 10 + 10, "none": stream(300) % 10 + 20}
    mixture = Mixture(streams, {"low": 3.0, "high": 1.0, "none": 0.0}, 8, EOS_ID, CPU)
    rows = torch.cat([mixture.batch(64, 0, step)[0] for step in range(20)])
    low, high = (rows < 10).all(1), (rows >= 10).all(1)
    assert bool((low | high).all())  # no window crosses from one stream into the next
    assert abs(low.float().mean().item() - 0.75) < 0.05


def test_batches_depend_on_seed_and_step_alone() -> None:
    mixture = Mixture({"a": stream(500)}, {"a": 1.0}, 8, EOS_ID, CPU)
    first = mixture.batch(4, 1, 7)
    mixture.batch(4, 1, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, mixture.batch(4, 1, 7), strict=True))
    assert not torch.equal(first[0], mixture.batch(4, 1, 8)[0])
    assert not torch.equal(first[0], mixture.batch(4, 2, 7)[0])


def test_every_place_of_a_stream_can_be_drawn() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    mixture = Mixture({"a": tokens}, {"a": 1.0}, 8, 0, CPU)
    starts = {int(mixture.batch(1, 0, step)[0][0, 0]) for step in range(80)}
    assert starts == {0, 1, 2}
    assert int(mixture.batch(64, 0, 0)[1].max()) < 12


def test_a_document_starts_at_each_eos() -> None:
    windows = torch.tensor([[5, 6, 0, 7, 0, 0, 8]])
    inputs, targets, seq_idx = split_windows(windows, 0)
    assert inputs.tolist() == [[5, 6, 0, 7, 0, 0]]
    assert targets.tolist() == [[6, 0, 7, 0, 0, 8]]
    assert seq_idx.tolist() == [[0, 0, 1, 1, 2, 3]]
    assert seq_idx.dtype == torch.int32


@pytest.mark.parametrize(("weights", "message"), [({"b": 1.0}, "'b'.*got 0"), ({"a": 1.0}, "more than 600")])
def test_a_stream_must_hold_a_window(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture({"a": stream(500)}, weights, 599, EOS_ID, CPU)


def test_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [rate_factor(progress / 100, 0.1, 0.4) for progress in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert rate_factor(1.0, 0.0, 0.0) == 1.0


# Training


def test_loss_scores_every_next_token_of_separate_documents() -> None:
    model = small_model()
    windows = torch.tensor([[3, 4, 0, 5, 6, 7]])
    loss = stream_loss(model, *split_windows(windows, EOS_ID))
    parts = [F.cross_entropy(model(windows[:, a:b]).logits[0], windows[0, a + 1 : b + 1]) for a, b in ((0, 2), (2, 5))]
    assert loss.item() == pytest.approx((2 * parts[0].item() + 3 * parts[1].item()) / 5, rel=1e-5)


def test_loss_falls_and_nothing_but_matrices_decays(tmp_path: Path) -> None:
    run = training(tmp_path, steps=60, log_every=10)
    spared = {id(p) for p in run.optimizer.param_groups[1]["params"]}
    assert run.optimizer.param_groups[1]["weight_decay"] == 0.0
    for name, parameter in run.model.named_parameters():
        assert (id(parameter) in spared) == (name.endswith(("A_log", ".D", "bias")) or "norm" in name), name
    run.run_until(60)
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.1
    assert run.progress == 1.0
    assert [entry["step"] for entry in run.history] == [10, 20, 30, 40, 50, 60]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = training(tmp_path / "whole", save_every=3)
    whole.run_until(6)
    first = training(tmp_path / "parts", save_every=3)
    first.run_until(4)  # the checkpoint is of step 3; the fourth step is lost
    second = training(tmp_path / "parts", save_every=3)
    assert second.restore()
    assert second.step == 3
    second.run_until(6)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole.history == second.history


def test_no_checkpoint_and_a_broken_one(tmp_path: Path) -> None:
    run = training(tmp_path)
    assert not run.restore()
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        run.restore()


def test_time_limit_completes_the_fall_of_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("mambacus.tuning.pretraining.time.perf_counter", lambda: float(next(clock)))
    run = training(tmp_path, steps=10**6, max_minutes=0.5, log_every=1)
    run.run_until(10**6)
    assert 20 <= run.step <= 31  # one tick a second, half a minute
    rates = [entry["learning_rate"] for entry in run.history]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1.5e-3


def test_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path: Path) -> None:
    run = training(tmp_path, log_every=5, save_every=2)
    run.run_until(3)
    with torch.no_grad():
        run.model.backbone.layers[1].mixer.out_proj.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="the loss became nan between steps 2 and 4"):
        run.run_until(6)
    kept = training(tmp_path)
    assert kept.restore()
    assert kept.step == 2
    assert all(bool(parameter.isfinite().all()) for parameter in kept.model.parameters())


# Measures


class _Fixed(torch.nn.Module):
    """Gives the same logits whatever it reads: those of a table indexed by the token."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.device = CPU

    def forward(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    model: Any = _Fixed(torch.zeros(40, 40))
    found = perplexity(model, stream(101), 200, plan(), EOS_ID, 1_000)
    assert found["perplexity"] == pytest.approx(40, rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(math.log2(40) * 101 / 200, rel=1e-3)


def test_perplexity_takes_no_more_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    model: Any = _Fixed(torch.zeros(40, 40))
    monkeypatch.setattr(_Fixed, "forward", lambda self, ids, seq_idx=None: (
        read.append(ids.numel()), SimpleNamespace(logits=self.table[ids]))[1])  # fmt: skip
    perplexity(model, stream(5_000), 5_000, plan(), EOS_ID, 240)
    assert sum(read) == 240


def test_sums_right_needs_every_digit() -> None:
    table = torch.zeros(40, 40)
    for token, follower in ((7, 8), (8, 9)):  # 7 is followed by 8, 8 by 9, all others by token 0
        table[token, follower] = 1.0
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [int(part) for part in text.split()])
    model: Any = _Fixed(table)
    assert sums_right(model, tokenizer, [("5 7", "8 9")], EOS_ID, PAD_ID) == 1.0
    assert sums_right(model, tokenizer, [("7", "8 9"), ("5 6 7", "8 7")], EOS_ID, PAD_ID) == 0.5


# The command


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gzip

    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    paragraph = "The old man walked to the river and sat down. Nobody knew his name, and he told nobody.\n\n"
    for name, files in TEXT_FILES.items():
        for file in files:
            row = {"id": name, "text": paragraph * 30}
            if name == "arithmetic_train":
                row = {"question": "What is 2 + 3?", "answer": "5"}
            line = (json.dumps(row) + "\n").encode() * 3
            (folder / "text" / file).write_bytes(gzip.compress(line) if file.endswith(".gz") else line)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus.narratives(0, 0, 300), 300).save(str(path))
    return path


@pytest.fixture
def flags(corpus_folder: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    original = registry.random_model

    def with_reference_ops(config: MambaConfig, seed: int = 0) -> MambaLM:
        model = original(config, seed)
        model.set_backend("reference")
        return model

    monkeypatch.setattr(registry, "random_model", with_reference_ops)
    monkeypatch.setattr(pretrain, "_VALID_TOKENS", 64)
    monkeypatch.setattr(pretrain, "_PROBED_SUMS", 8)
    monkeypatch.setattr(pretrain, "_SAMPLE_PROMPTS", ("The old man",))
    monkeypatch.setattr(corpus, "_VALID_NARRATIVES", 20)

    def build(out: Path, **changes: Any) -> list[str]:
        values = {
            "out": out, "data-dir": corpus_folder, "device": "cpu", "d-model": 16, "n-layer": 1, "vocab-size": 300,
            "steps": 4, "batch": 2, "seqlen": 16, "narratives": 40, "sum-sheets": 5, "workers": 1, "log-every": 1,
            "valid-every": 2, "save-every": 1, "tokenizer": tokenizer_file,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in (values | changes).items() if value is not None]

    return build


def test_command_leaves_a_model_that_loads(
    tmp_path: Path, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "tokenizer_sample", lambda *_: corpus.narratives(0, 0, 300))
    pretrain.main(flags(tmp_path / "run", tokenizer=None))
    record = read_record(tmp_path / "run" / "record.json")
    assert record.kind == "pretrain"
    assert record.results["train"]["steps"] == 4
    assert [entry["step"] for entry in record.results["validation"]] == [2, 4]
    assert set(record.results["validation"][-1]["sums_right"]) == set("+-*/")
    assert len(record.results["samples"]) == len(pretrain._SAMPLE_PROMPTS)
    model, tokenizer = load(tmp_path / "run" / "model")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (EOS_ID, PAD_ID)
    assert tokenizer.pad_token_id == PAD_ID
    stored, _ = load(tmp_path / "run" / "model", dtype=None)
    dtypes = {name.rsplit(".", 1)[-1]: p.dtype for name, p in stored.named_parameters()}
    assert dtypes["A_log"] == dtypes["D"] == torch.float32
    assert stored.dtype == torch.bfloat16
    assert read_record(tmp_path / "run" / "model" / "training_record.json") == record
    before = (tmp_path / "run" / "record.json").read_bytes()
    pretrain.main([*flags(tmp_path / "run", tokenizer=None), "--resume"])  # finished: nothing is done again
    assert (tmp_path / "run" / "record.json").read_bytes() == before
    with pytest.raises(UserError, match=r"holds another run .*seed"):
        pretrain.main([*flags(tmp_path / "run", tokenizer=None, seed=1), "--resume"])


def test_killed_run_resumes_to_the_same_model(
    tmp_path: Path, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.main(flags(tmp_path / "whole"))
    log = Pretraining._log

    def dies(self: Pretraining) -> None:
        log(self)
        if self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_log", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(flags(tmp_path / "killed"))
    with pytest.raises(UserError, match="--resume"):
        pretrain.main(flags(tmp_path / "killed"))
    pretrain.main([*flags(tmp_path / "killed"), "--resume"])
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    records = [read_record(tmp_path / name / "record.json") for name in ("whole", "killed")]
    assert records[0].results["validation"] == records[1].results["validation"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "batch": 0}, "--steps: expected 1 or more, got 0; --batch: expected 1 or more, got 0"),
        ({"lr": "nan"}, "--lr: expected more than 0, got nan"),
        ({"vocab-size": 3}, "--vocab-size: expected 258 or more and at most 65536, got 3"),
        ({"warmup": "nan"}, "--warmup: expected 0 or more and at most 1, got nan"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"warmup": 0.8, "decay": 0.4}, "--warmup and --decay"),
        ({"vocab-size": 70000}, "at most 65536"),
        ({"text-weight": 0, "narratives-weight": 0, "sums-weight": 0}, "one above 0"),
        ({"data-dir": "/nowhere"}, "no such folder"),
    ],
)
def test_bad_settings_claim_nothing(
    tmp_path: Path, flags: Callable[..., list[str]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain.main(flags(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_wrong_tokenizer_is_refused(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match="--tokenizer: no such file"):
        pretrain.main(flags(tmp_path / "a", tokenizer=tmp_path / "none.json"))
    with pytest.raises(UserError, match="expected 310 tokens"):
        pretrain.main(flags(tmp_path / "b", **{"vocab-size": 310}))


def test_shipped_recipe_is_valid() -> None:
    from mambacus.runtime.config import parse

    recipe = Path(__file__).parents[1] / "recipes" / "pretrain-tiny.yaml"
    config = parse(pretrain.Config, ["-c", str(recipe), "--out", "o", "--data-dir", "d"], "x", "")
    assert (config.d_model, config.n_layer, config.vocab_size, config.max_minutes) == (256, 8, 4096, 5.5)
