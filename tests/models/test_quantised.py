"""Quantised models: what is replaced, what it costs, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from model_twins import small_model, tokens

from mambacus.inference import Engine, SamplingParams
from mambacus.models import MambaLM, load, save
from mambacus.models.quantised import QuantisedEmbedding, QuantisedLinear, perplexity, quantise, quantise_and_measure
from mambacus.models.signature import mismatch, signature
from mambacus.ops.quantised_linear import unpack
from mambacus.runtime.errors import UserError

EACH_FORMAT = pytest.mark.parametrize("name", ["int8", "int4"])


def unpacked(model: MambaLM) -> MambaLM:
    """Return an ordinary model whose weights are those of a quantised one."""
    plain, stored = MambaLM(model.config), dict(model.named_parameters())
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantisedLinear)
    }
    stored |= {f"{name}.weight": unpack(module.packed) for name, module in modules.items()}
    stored["backbone.embeddings.weight"] = stored["lm_head.weight"]
    plain.load_state_dict({name: stored[name] for name in plain.state_dict()})
    return plain.eval()


@EACH_FORMAT
def test_large_matrices_are_replaced_and_the_rest_stays(name):
    model = small_model().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = quantise(model, name)
    mixer = model.backbone.layers[0].mixer
    for module in (mixer.in_proj, mixer.x_proj, mixer.out_proj, model.lm_head):
        assert isinstance(module, QuantisedLinear)
    assert isinstance(model.backbone.embeddings, QuantisedEmbedding)
    for n, p in model.named_parameters():
        assert not p.requires_grad and (n.endswith((".codes", ".scales")) or torch.equal(p, before[n]))
    assert found.bytes_after == sum(p.nbytes for p in model.parameters()) < 0.7 * found.bytes_before
    assert model.dtype == torch.float32 and model.device.type == "cpu"


@EACH_FORMAT
def test_runs_as_a_model_with_those_weights(name):
    model = small_model().eval()
    quantise(model, name)
    plain, ids = unpacked(model), tokens(2, 90)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(model(ids[:, :9]).logits, plain(ids[:, :9]).logits, rtol=2e-3, atol=2e-3)


@EACH_FORMAT
def test_decoding_is_reading(name):
    model = small_model().eval()
    quantise(model, name)
    ids = tokens(1, 12)
    plain = unpacked(model)
    with torch.inference_mode():
        whole, out, steps = model(ids).logits, None, []
        for t in range(12):
            out = model(ids[:, t : t + 1], state=None if out is None else out.state, reuse_state=True)
            steps.append(out.logits)
        rounding = (whole - plain(ids).logits).abs().max()  # what inputs of 16 bits cost: 3e-4 of logits up to 2.2
    # An input at the edge of two integers may become the other one where it was summed up in another order.
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0.0, atol=2 * rounding.item())
    assert rounding < 1e-3


def test_keeps_its_format_in_another_dtype():
    model = small_model().eval()
    quantise(model, "int8")
    model.to(torch.bfloat16)
    assert model.lm_head.codes.dtype == torch.int16 and model.lm_head.scales.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(tokens(1, 3)).logits.isfinite().all()


def test_the_cost_of_tiny_is_small_and_known(capsys):
    model, tokenizer = load("tiny", weights="int8")
    found = model.quantisation
    assert found.tokens > 1000 and abs(found.perplexity_after / found.perplexity_before - 1) < 0.005
    assert str(found) in capsys.readouterr().err
    [[completion]] = Engine(model, tokenizer).generate(["Tom has 3 apples"], SamplingParams(max_new_tokens=5))
    assert len(completion.token_ids) == 5


def test_perplexity_is_that_of_reading_at_once():
    model, ids = small_model().eval(), tokens(1, 150)
    with torch.no_grad():
        whole = model(ids, labels=ids).loss.exp().item()
    assert perplexity(model, [ids[0].tolist()]) == pytest.approx(whole, rel=1e-4)


def test_is_known_as_another_model():
    model = small_model()
    quantised = copy.deepcopy(model)
    quantise(quantised, "int8")
    assert mismatch(signature(model), quantised) is not None and mismatch(signature(quantised), model) is not None
    assert mismatch(signature(quantised), quantised) is None


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    model = small_model()
    with pytest.raises(UserError, match=r"weights: expected int8 or int4, got 'int3'"):
        quantise(model, "int3")
    with pytest.raises(UserError, match="merge it first"):
        load("tiny", adapter=tmp_path, weights="int8")
    with pytest.raises(UserError, match="for a CPU, got device meta"):
        load("random:micro", device="meta", weights="int8")
    quantise_and_measure(model, None, "int4")
    assert "not measured" in str(model.quantisation)
    with pytest.raises(UserError, match="int4 already"):
        quantise(model, "int8")
    with pytest.raises(UserError, match="the model's weights are int4"):
        save(model, tmp_path / "out")


def test_token_ids_are_checked_as_those_of_an_embedding():
    model = small_model().eval()
    quantise(model, "int8")
    ids, size = tokens(1, 5), model.config.padded_vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids.int()).logits, model(ids).logits)
        for wrong in (-1, size):
            with pytest.raises(IndexError, match=f"index {wrong} is out of range: there are {size} rows"):
                model(torch.tensor([[0, wrong]]))


def test_training_is_refused():
    model = small_model()
    quantise(model, "int8")
    model.backbone.norm_f.weight.requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        model(tokens(1, 4))
