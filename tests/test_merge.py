"""``mambacus merge`` from the command line: a folder that other software loads, or a refusal and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambacus import finetune, merge
from mambacus.cli import main
from mambacus.models import load
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record

IDS = torch.arange(1, 41)[None]


def tune(folder: Path, *targets: str) -> Path:
    """Fine-tune ``random:micro`` for three steps; return the run."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(1, 9)))
    finetune.run(
        finetune.Config(
            model="random:micro", data=str(rows), out=folder / "run", max_steps=3, batch_size=8, lr=0.05,
            targets=targets, device="cpu", dtype="float32", check=0,
        )
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run with the default targets."""
    return tune(tmp_path_factory.mktemp("plain"), "in_proj", "out_proj")


@pytest.fixture(scope="module")
def tied_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run with an adapter on the tied embedding."""
    return tune(tmp_path_factory.mktemp("tied"), "embeddings", "in_proj")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """An adapter that a test may damage."""
    return Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))


def attached_logits(adapter: Path) -> torch.Tensor:
    model, _ = load("random:micro", adapter=adapter)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("which", ["run", "tied_run"])
def test_the_merged_folder_gives_the_attached_logits_here_and_in_transformers(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer, MambaForCausalLM

    source: Path = request.getfixturevalue(which)
    record = merge.run(merge.Config(adapter=(source,), out=tmp_path / "merged"))
    expected = attached_logits(source / "adapter")
    scale = expected.abs().max()
    ours, tokenizer = load(tmp_path / "merged")
    theirs = MambaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (ours(IDS).logits - expected).abs().max() <= 1e-4 * scale
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-4 * scale
    tied = which == "run"
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings == tied
    assert record.results["untied"] is not tied
    text = "2 + 2 = 4"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"] == tokenizer(text)["input_ids"]
    stored = read_record(tmp_path / "merged" / "record.json")
    assert stored.kind == "merge"
    assert stored.results["gate"]["prompts"] == 12
    assert stored.results["gate"]["max_logit_difference"] <= stored.results["gate"]["tolerance"]


def test_the_cast_comes_last_and_its_cost_is_told(run: Path, tmp_path: Path) -> None:
    record = merge.run(merge.Config(adapter=(run / "adapter",), out=tmp_path / "merged", dtype="bfloat16"))
    exact = merge.run(merge.Config(adapter=(run / "adapter",), out=tmp_path / "exact"))
    cast, gate = record.results["after_cast"], record.results["gate"]
    assert gate == exact.results["gate"]
    assert cast["dtype"] == "bfloat16"
    assert cast["max_logit_difference"] > gate["max_logit_difference"]
    low, high = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exact"))
    for name, tensor in high.items():
        kept = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert low[name].dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(low[name], tensor.to(low[name].dtype)), name


def test_a_merge_that_does_not_agree_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.tuning import merge as folding

    fold = folding.merge

    def tampered(attached: Any) -> Any:
        model, untied = fold(attached)
        with torch.no_grad():
            model.backbone.layers[0].mixer.in_proj.weight[0] += 0.5  # type: ignore[union-attr]
        return model, untied

    monkeypatch.setattr(folding, "merge", tampered)
    with pytest.raises(UserError, match=r"merge refused.*nothing was written"):
        merge.run(merge.Config(adapter=(run,), out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def cut_short(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / "adapter_model.safetensors")


def remove_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def garble_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LO')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "corrupt"),
        (drop_a_tensor, "missing in the adapter"),
        (remove_weights, "adapter_model.safetensors"),
        (garble_config, "not valid JSON"),
    ],
)
def test_a_damaged_adapter_is_one_line(
    copy: Path, tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main(["merge", "--adapter", str(copy), "--out", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mambacus merge: error: ")
    assert "\n" not in error
    assert words in error
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    for model in ("random:tiny", str(other_micro(tmp_path))):
        with pytest.raises(UserError, match="made for random:micro, does not fit"):
            merge.run(merge.Config(adapter=(run,), out=tmp_path / "merged", model=model))
    assert not (tmp_path / "merged").exists()


def other_micro(folder: Path) -> Path:
    """A model of the same shape as ``random:micro`` with other values."""
    from mambacus.models import save

    model, tokenizer = load("random:micro", seed=7)
    save(model, folder / "other", tokenizer)
    return folder / "other"


def test_an_occupied_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        merge.run(merge.Config(adapter=(run,), out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "nowhere"], "nowhere: no such folder"),
        (["--dtype", "int4"], "--dtype"),
        (["--model", "no/where"], "no/where"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    run: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--adapter", str(run), "--out", str(tmp_path / "merged"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert words in error


def test_several_adapters_are_combined(run: Path, tied_run: Path, tmp_path: Path) -> None:
    both = (run, tied_run)
    record = merge.run(merge.Config(adapter=both, weights=(0.5, 1.0), out=tmp_path / "sum"))
    assert [found["adapter"] for found in record.results["gates"]] == [str(path / "adapter") for path in both]
    assert record.results["untied"]
    assert len(record.results["from_each"]) == 2
    alone = [merge.run(merge.Config(adapter=(path,), out=tmp_path / path.parent.name)) for path in both]
    assert not any("gates" in found.results for found in alone)
    base = dict(load("random:micro")[0].named_parameters())
    first, second, total = (
        load_file(tmp_path / name / "model.safetensors") for name in (run.parent.name, tied_run.parent.name, "sum")
    )
    name = "backbone.layers.0.mixer.in_proj.weight"
    wanted = base[name] + 0.5 * (first[name] - base[name]) + (second[name] - base[name])
    assert torch.allclose(total[name], wanted, atol=1e-6)
    for rule in ("ties", "dare"):
        merge.run(merge.Config(adapter=both, combine=rule, density=0.5, out=tmp_path / rule))
        assert not torch.equal(load_file(tmp_path / rule / "model.safetensors")[name], total[name])
