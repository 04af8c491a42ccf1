"""The sides of a benchmark do what the row says they do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mambacus.measuring import huggingface, ours, shapes
from mambacus.measuring.cases import Case
from mambacus.measuring.sides import make_side

CASE = Case("generate", "transformers", "micro", "float32", 2, 12, new_tokens=4)


def small(name: str) -> shapes.TransformerShape:
    shape = shapes.SHAPES[name]
    narrow = 16 if shape.d_embed else 0
    return dataclasses.replace(shape, d_model=32, n_layer=2, n_head=2, vocab_size=64, d_embed=narrow)


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "gpt-neo-125m", "gpt2", "pythia-70m"])
@pytest.mark.parametrize("benchmark", ["prefill", "decode", "generate", "train"])
def test_every_family_runs(name, benchmark, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, name, small(name))
    steps = 3 if benchmark in ("decode", "generate") else 0
    case = Case(benchmark, name, "micro", "float32", 2, 10, steps, method="lora" if benchmark == "train" else "full")
    side = huggingface.make(case)
    step = side.generate(steps) if benchmark == "generate" else getattr(side, benchmark)()
    for _ in range(2):  # the second run starts where the first one did
        step()
    tokens = 10 + (steps if benchmark == "decode" else max(0, steps - 1))
    assert side.state_bytes() == (None if benchmark == "train" else 2 * 2 * 2 * tokens * 32 * 4)
    assert side.facts()["attention"] == ("eager" if name == "gpt-neo-125m" else "sdpa")


def test_lora_goes_on_attention_only():
    from peft import LoraConfig, get_peft_model

    side = huggingface.make(Case("train", "pythia-micro", "micro", "float32", 1, 8, method="lora"))
    attached = get_peft_model(side.model, LoraConfig(target_modules=side.facts()["lora_targets"]))
    adapted = [name.split(".lora_A")[0] for name, _ in attached.named_parameters() if ".lora_A." in name]
    places = {name.rsplit(".", 2)[-2] for name in adapted}
    assert places == {"attention"}


def test_our_lora_is_that_of_finetune():
    side = ours.make(Case("train", "mambacus", "micro", "float32", 1, 8, method="lora"))
    step = side.train()
    step()
    trained = [name for name, parameter in side.model.named_parameters() if parameter.grad is not None]
    assert trained and all(".lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {"in_proj", "out_proj"}


def test_logits_of_the_last_token_or_of_all():
    for name in ("mambacus", "transformers", "pythia-micro"):
        for logits, rows in (("last", 1), ("all", 12)):
            side = make_side(Case("prefill", name, "micro", "float32", 2, 12, logits=logits))
            assert side.prefill()().shape == (2, rows, 512)


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_our_quantised_weights_are_small(dtype, bits):
    side = ours.make(Case("decode", "mambacus", "tiny", dtype, 1, 8, new_tokens=2))
    side.decode()()
    wide = ours.make(Case("decode", "mambacus", "tiny", "float32", 1, 8, new_tokens=2))
    assert bits / 32 < side.weights_bytes / wide.weights_bytes < bits / 32 + 0.2  # scales, and what stays float32
    assert side.read_bytes == side.weights_bytes and side.facts() == {"activations": "float32"}


@pytest.mark.slow  # compiles for half a minute each
@pytest.mark.parametrize("name", ["transformers", "pythia-micro"])
def test_the_compiled_peer_generates_what_the_eager_one_does(name, monkeypatch):
    texts = []
    for graph in (False, True):
        torch.manual_seed(0)
        side = huggingface.make(dataclasses.replace(CASE, implementation=name, graph=graph))
        chosen: list[torch.Tensor] = []
        usual = side._step_forward

        def noting(token, usual=usual, chosen=chosen, **kwargs):
            chosen.append(token.clone())
            return usual(token, **kwargs)

        side._step_forward = noting
        step = side.generate(CASE.new_tokens)
        step()
        step()
        texts.append(torch.cat(chosen, dim=1))
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["decode", "prefill", "train"])
def test_the_compiled_transformer_runs(benchmark):
    case = Case(benchmark, "pythia-micro", "micro", "float32", 2, 12, 4 if benchmark == "decode" else 0, graph=True)
    side = huggingface.make(case)
    step = getattr(side, benchmark)()
    step()
    step()
    assert side.facts()["compiled"].startswith("torch.compile")


def test_llama_cpp_computes_our_model():
    pytest.importorskip("llama_cpp", reason="the extra [peers] is not installed")
    from mambacus.measuring import llama_cpp
    from mambacus.models import load

    case = Case("decode", "llama.cpp", "micro", "float32", 2, 40, new_tokens=3, threads=1)
    side = llama_cpp.make(case)
    tokens = side._read_prompts()
    model, _ = load("random:micro")
    expected = model(torch.tensor(side._ids)).logits[:, -1]
    got = torch.stack([torch.from_numpy(side.logits(place).copy()) for place in (39, 79)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert tokens == expected.argmax(-1).tolist()
    side.decode()()
    side.generate(3)()
    assert side.facts()["format"] == "F32"
