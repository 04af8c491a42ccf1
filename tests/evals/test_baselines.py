"""Transformers models behind the interface of our engine, and the choice between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambacus.evals.baselines import BaselineEngine, choose_implementation, load_baseline
from mambacus.inference import Engine, SamplingParams
from mambacus.runtime.errors import UserError

PROMPTS = ["Once upon a time", "2 + 2 =", "x", "A rather longer prompt than the others, to be padded for"]


@pytest.fixture(scope="module")
def baseline(checkpoint: Any) -> BaselineEngine:
    import torch

    return BaselineEngine(*load_baseline(str(checkpoint.folder), torch.device("cpu"), torch.float32, None), 3)


@pytest.mark.parametrize("stop", [(), ("e",), ("zq", "a", "o")])
def test_completions_are_those_of_our_engine(checkpoint: Any, baseline: BaselineEngine, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_new_tokens=20, stop=stop)
    ours = Engine(checkpoint.model, checkpoint.tokenizer).generate(PROMPTS, params)
    assert baseline.generate(PROMPTS, params) == ours
    reasons = {completion.finish_reason for (completion,) in ours}
    assert reasons == {"length"} if not stop else reasons <= {"stop", "length"}


def test_rows_are_cut_at_their_own_end(baseline: BaselineEngine) -> None:
    params = SamplingParams(max_new_tokens=6, stop=("b",))
    ids = baseline.tokenizer("cab").input_ids
    eos = baseline.tokenizer.eos_token_id
    stopped = baseline._completion([*ids, eos, eos], params)
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("ca", ids, "stop")
    ended = baseline._completion([*ids[:2], eos, eos, eos], params)
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("ca", [*ids[:2], eos], "eos")
    assert baseline._completion(ids[:2] * 3, params).finish_reason == "length"


def test_samples_repeat_with_their_seed_and_fill_their_prompt(baseline: BaselineEngine) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=1.0, n=2, seed=5)
    done: list[int] = []
    first = baseline.generate(PROMPTS, params, progress=done.append)
    assert [len(found) for found in first] == [2] * len(PROMPTS)
    assert sum(done) == len(PROMPTS)
    assert baseline.generate(PROMPTS, params) == first
    assert baseline.generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=1.0, n=2, seed=6)) != first


def test_who_runs_what(checkpoint: Any, tmp_path: Path) -> None:
    assert choose_implementation(str(checkpoint.folder), "auto") == "mambacus"
    assert choose_implementation(str(checkpoint.folder), "hf") == "hf"
    assert choose_implementation("random:micro", "auto") == "mambacus"
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert choose_implementation(str(tmp_path), "auto") == "hf"
    with pytest.raises(UserError, match="of type 'gpt2'"):
        choose_implementation(str(tmp_path), "mambacus")
    with pytest.raises(UserError, match="needs a model folder or hub id"):
        choose_implementation("random:micro", "hf")


def test_a_folder_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    import torch

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UserError, match="transformers cannot load") as caught:
        load_baseline(str(tmp_path), torch.device("cpu"), torch.float32, None)
    assert "\n" not in str(caught.value)


def test_files_that_transformers_would_make_up_are_missed(checkpoint: Any, tmp_path: Path) -> None:
    import shutil

    import safetensors.torch
    import torch

    def refused(folder: Path, message: str, adapter: Path | None = None) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_baseline(str(folder), torch.device("cpu"), torch.float32, adapter)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "m"
    shutil.copytree(checkpoint.folder, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    refused(folder, "transformers cannot load")
    tensors = safetensors.torch.load(whole)
    del tensors["backbone.layers.1.mixer.in_proj.weight"]
    safetensors.torch.save_file(tensors, weights)
    refused(folder, r"its files lack 1 weights: backbone\.layers\.1\.mixer\.in_proj\.weight")
    weights.write_bytes(whole)
    refused(folder, "nowhere: no such folder", tmp_path / "nowhere")
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, "no tokenizer beside the model")
