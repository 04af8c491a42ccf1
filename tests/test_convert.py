"""The verb ``convert``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mambacus.cli import main
from mambacus.models import MambaLM, load, load_config, load_tokenizer, save
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_cast_keeps_the_dynamics_in_float32_in_either_format(
    tmp_path: Path, dtype: str, sharded: bool, tied: bool
) -> None:
    torch.manual_seed(3)
    model = MambaLM(dataclasses.replace(load_config("random:micro"), tie_embeddings=tied))
    save(model, tmp_path / "a", load_tokenizer("random:micro"), max_shard_bytes=100_000 if sharded else 10**9)
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == sharded
    steps = (("a", "b", "original", dtype), ("b", "c", "hf", "stored"), ("c", "d", "original", "stored"))
    for source, target, to, kept in steps:
        argv = ["--model", str(tmp_path / source), "--out", str(tmp_path / target), "--to", to, "--dtype", kept]
        assert main(["convert", *argv]) == 0
    expected = getattr(torch, dtype)
    first = dict(model.named_parameters())
    for folder in ("b", "c", "d"):
        there = dict(load(tmp_path / folder, dtype=None)[0].named_parameters())
        assert there.keys() == first.keys() and ("lm_head.weight" in there) == (not tied)
        for name, parameter in there.items():
            dynamics = name.endswith(("A_log", ".D", "dt_proj.bias"))
            assert parameter.dtype == (torch.float32 if dynamics else expected), name
            assert torch.equal(parameter, first[name].to(parameter.dtype)), name
    written = torch.load(tmp_path / "d" / "pytorch_model.bin", weights_only=True)
    assert written["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert written["lm_head.weight"].dtype == expected


def test_a_cast_back_to_float32_is_exact(tmp_path: Path) -> None:
    for source, target, dtype in (
        ("random:micro", "low", "bfloat16"),
        ("low", "high", "float32"),
        ("high", "again", "bfloat16"),
    ):
        model = source if ":" in source else str(tmp_path / source)
        assert main(["convert", "--model", model, "--out", str(tmp_path / target), "--dtype", dtype]) == 0
    low, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("low", "again"))
    assert low == again
