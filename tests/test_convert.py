"""The verb ``convert``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mambacus.cli import main
from mambacus.models import load
from mambacus.runtime.records import read_record


def test_there_and_back_is_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("hf", "original", "again")]
    for source, folder, to in zip(["random:micro", *folders], folders, ["hf", "original", "hf"], strict=False):
        assert main(["convert", "--model", str(source), "--out", str(folder), "--to", to]) == 0
        assert f"{folder}: 98,240 parameters" in capsys.readouterr().out
    first, last = (folder / "model.safetensors" for folder in (folders[0], folders[2]))
    assert first.read_bytes() == last.read_bytes()
    assert (folders[1] / "pytorch_model.bin").exists() and (folders[1] / "tokenizer.json").exists()
    record = read_record(folders[1] / "record.json")
    assert record.kind == "convert" and record.results["dtype"] == "float32"
    assert "pytorch_model.bin" in record.results["files"]


def test_the_dtype_is_kept_or_as_asked(tmp_path: Path) -> None:
    import transformers

    assert main(["convert", "--model", "random:micro", "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    assert main(["convert", "--model", str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load(tmp_path / "c", dtype=None)
    assert model.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.dt_proj.bias.dtype == torch.float32
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype="auto")
    assert twin.dtype == torch.bfloat16


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in (
        (tmp_path, "expected a new or empty folder"),
        (tmp_path / "notes.txt", "expected a folder, got a file"),
        (tmp_path / "notes.txt" / "model", "notes.txt is a file, not a folder"),
    ):
        assert main(["convert", "--model", "random:micro", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
