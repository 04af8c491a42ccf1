"""The verb ``info``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mambacus.cli import main
from mambacus.models import load, load_config
from mambacus.models.counting import count_flops, count_parameters
from mambacus.runtime.records import read_record


def test_the_record_counts_what_the_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "info.json"
    assert main(["info", "random:micro", "--device", "cpu", "--out", str(out)]) == 0
    results = read_record(out).results
    model, _ = load("random:micro")
    assert results["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert results["parameters"]["in_proj"] == 2 * 64 * 256
    assert results["parameters"]["lm_head"] == 0  # tied
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(dtype)
        assert results["weight_bytes"][name] == sum(parameter.nbytes for parameter in model.parameters())
        assert results["state_bytes"][name] == model(ids).state.nbytes
    assert set(results["backends"]) == {
        "causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update"
    }  # fmt: skip
    assert all(choice["reason"] for choice in results["backends"].values())
    assert "98,240 parameters" in capsys.readouterr().out


def test_products_of_the_130m_shape_cost_what_the_matrices_say() -> None:
    flops = count_flops(load_config("random:130m"))
    assert flops["lm_head"] == 2 * 768 * 50280
    assert flops["in_proj"] == 2 * 24 * 768 * 3072
    assert flops["total"] == sum(count for part, count in flops.items() if part != "total")
    assert 0.25e9 < flops["total"] < 0.27e9


def test_an_untied_head_counts(tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(load_config("random:micro"), tie_embeddings=False)
    assert count_parameters(config)[0]["lm_head"] == 512 * 64


def test_faults_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "random:3b"]) == 2
    assert "expected random:SIZE" in capsys.readouterr().err
    assert main(["info"]) == 2
    assert "missing MODEL" in capsys.readouterr().err
    for device in ("gpu", "mps", "meta", "cpu:1", ""):
        assert main(["info", "random:micro", "--device", device]) == 2
        assert f"--device: expected auto, cpu, cuda or cuda:N, got {device!r}" in capsys.readouterr().err


def test_a_record_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "info.json"
    out.write_text("precious")
    assert main(["info", "random:micro", "--out", str(out)]) == 2
    assert "exists already; add --overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main(["info", "random:micro", "--out", str(out), "--overwrite"]) == 0
    assert read_record(out).kind == "info"


def test_a_transformer_is_described_by_its_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "EleutherAI/pythia-160m", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for words in ("162,322,944 parameters", "gpt_neox, d_model 768, 12 layers", "keys and values 72.0 KiB a token"):
        assert words in out
    assert "it is a baseline" in out


def test_json_holds_what_the_lines_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "random:micro", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "random:micro" and found["parameters"]["total"] == 98_240
    assert found["backends"]["selective_scan"]["name"] == "cpu" and "numba" in found["kernels"]


def test_what_is_no_model_to_describe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert main(["info", str(tmp_path)]) == 2
    assert "got 'bloom'" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "opt", "vocab_size": 9}')
    assert main(["info", str(tmp_path)]) == 2
    assert "hidden_size: expected a positive integer, got None" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["info", str(tmp_path)]) == 2
    assert "it is an adapter: give its base model" in capsys.readouterr().err
