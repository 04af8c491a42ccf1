"""The verb ``info``."""

from __future__ import annotations

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
