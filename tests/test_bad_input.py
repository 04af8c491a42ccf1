"""What a user can get wrong: one line that names the thing, exit status 2, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mambacus import cli
from mambacus.models import load, save

pytestmark = pytest.mark.slow  # until every message was read against the finished verbs

GOOD_ROW = '{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A small model with the tokenizer of `tiny`."""
    _, tokenizer = load("tiny")
    torch.manual_seed(0)
    model, _ = load("random:tiny")
    folder = tmp_path_factory.mktemp("models") / "small"
    save(model, folder, tokenizer)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD_ROW * 3)
    return path


def fails(capsys, *argv: object) -> str:
    """Run a command that must fail as a user's fault does; return its message."""
    capsys.readouterr()
    status = cli.main([str(part) for part in argv])
    err = capsys.readouterr().err
    messages = [line for line in err.splitlines() if line.startswith("mambacus ")]
    assert status == 2, err
    assert len(messages) == 1, err
    assert "Traceback" not in err
    return messages[0]


@pytest.mark.parametrize(
    "argv",
    [
        ("finetune", "--data", "{data}", "--out", "{tmp}/run"),
        ("evaluate", "--tasks", "text_sample", "--out", "{tmp}/e.json"),
        ("solve", "--bench", "wordproblems", "--out", "{tmp}/s.json"),
        ("generate", "--prompt", "1 + 1 ="),
        ("info",),
        ("convert", "--out", "{tmp}/c", "--to", "hf"),
    ],
)
def test_missing_model(capsys, tmp_path, data, argv, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [part.format(data=data, tmp=tmp_path) for part in argv]
    model = ["no/such-model"] if argv == ("info",) else ["--model", "no/such-model"]
    assert "no/such-model" in fails(capsys, *words, *model)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_wrong_task_and_bench_get_suggestions(capsys, tmp_path, model_dir):
    message = fails(capsys, "evaluate", "--model", model_dir, "--tasks", "text_sampel", "--out", tmp_path / "e.json")
    assert "text_sampel" in message
    assert "text_sample" in message.replace("text_sampel", "")
    message = fails(capsys, "solve", "--model", model_dir, "--bench", "wordproblem", "--out", tmp_path / "s.json")
    assert "wordproblems" in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (GOOD_ROW * 16 + '{"question": \n', ("line 17", "not valid JSON")),
        (GOOD_ROW + '{"question": "What?"}\n', ("line 2", "answer")),
        (GOOD_ROW + '{"question": "  ", "answer": "3"}\n', ("line 2", "question")),
        (GOOD_ROW + "[1, 2]\n", ("line 2", "object")),
        ("", ("no ", "data.jsonl")),
        ("\n\n", ("no ", "data.jsonl")),
    ],
)
def test_bad_data_is_named_by_line(capsys, tmp_path, model_dir, data, content, parts):
    data.write_text(content)
    message = fails(capsys, "finetune", "--model", model_dir, "--data", data, "--out", tmp_path / "run")
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_missing_data_file(capsys, tmp_path, model_dir):
    message = fails(capsys, "finetune", "--model", model_dir, "--data", "gone.jsonl", "--out", tmp_path / "run")
    assert "gone.jsonl" in message


def test_out_directory_of_another_run_is_kept(capsys, tmp_path, model_dir, data):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"kind": "finetune", "identity": {"seed": 5}}))
    before = (out / "run.json").read_bytes()
    for extra in ([], ["--resume"]):
        message = fails(capsys, "finetune", "--model", model_dir, "--data", data, "--out", out, *extra)
        assert "holds another run" in message
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert (out / "run.json").read_bytes() == before


def test_records_are_not_overwritten(capsys, tmp_path, model_dir):
    out = tmp_path / "e.json"
    out.write_text("precious")
    for argv in (("evaluate", "--tasks", "text_sample"), ("solve", "--bench", "wordproblems")):
        assert "e.json" in fails(capsys, *argv, "--model", model_dir, "--out", out)
    assert out.read_text() == "precious"


def test_corrupt_safetensors(capsys, tmp_path, model_dir):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert weights.name in fails(capsys, "info", broken)
    assert weights.name in fails(capsys, "generate", "--model", broken, "--prompt", "x")


def test_adapter_for_another_model(capsys, tmp_path, data):
    from mambacus.models import load as load_model

    _, tokenizer = load_model("tiny")
    other, _ = load_model("random:tiny")
    torch.manual_seed(7)
    other.init_weights()
    other_dir = tmp_path / "other"
    save(other, other_dir, tokenizer)
    status = cli.main(
        ["finetune", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    )
    assert status == 0
    adapter = tmp_path / "run" / "adapter"
    message = fails(
        capsys, "solve", "--model", other_dir, "--adapter", adapter, "--bench", "wordproblems", "--limit", 2,
        "--out", tmp_path / "s.json",
    )  # fmt: skip
    assert "adapter" in message
    message = fails(capsys, "merge", "--model", other_dir, "--adapter", adapter, "--out", tmp_path / "merged")
    assert "adapter" in message
    assert not (tmp_path / "merged").exists()


def test_device_dtype_and_record_faults(capsys, tmp_path, model_dir):
    if not torch.cuda.is_available():
        assert "CUDA" in fails(capsys, "info", model_dir, "--device", "cuda")
    assert "float23" in fails(capsys, "generate", "--model", model_dir, "--prompt", "x", "--dtype", "float23")
    assert "nothing.json" in fails(capsys, "report", tmp_path / "nothing.json", "--out", tmp_path / "r.html")
    assert "nowhere.yaml" in fails(capsys, "study", "nowhere.yaml", "--out", tmp_path / "study")
    assert not (tmp_path / "r.html").exists()
