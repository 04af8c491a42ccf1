"""FLOPs, bytes and least times: formulas against operations counted by torch and tensors that are there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mambacus.measuring import costs, shapes
from mambacus.measuring.cases import Case
from mambacus.measuring.sides import make_side
from mambacus.models import load

PUBLISHED = {
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "opt-125m": 125_239_296, "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800, "gpt-neo-125m": 125_198_592, "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}  # fmt: skip
SEQLEN = 40


def meta_model(name: str):
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shapes.SHAPES[name].config())


@pytest.mark.parametrize("name", ["pythia-160m", "opt-350m", "gpt-neo-125m", "gpt2"])
def test_shapes_have_the_published_numbers_of_parameters(name):
    assert sum(parameter.numel() for parameter in meta_model(name).parameters()) == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_all_shapes_have_the_published_numbers_of_parameters(name):
    assert sum(parameter.numel() for parameter in meta_model(name).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["pythia-70m", "opt-125m", "opt-350m", "gpt-neo-125m", "gpt2"])
def test_a_transformer_does_the_products_counted(name, monkeypatch):
    import transformers

    published = shapes.SHAPES[name]
    narrow = 16 if published.d_embed else 0
    shape = dataclasses.replace(published, d_model=32, n_layer=2, n_head=2, vocab_size=64, d_embed=narrow)
    monkeypatch.setitem(shapes.SHAPES, name, shape)
    model = transformers.AutoModelForCausalLM.from_config(shape.config(), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, SEQLEN, dtype=torch.int64), use_cache=False)
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    products, attention = costs.forward_flops(name, "micro", SEQLEN, logits=SEQLEN)
    assert counted.pop("aten.mm", 0) + counted.pop("aten.addmm", 0) == 2 * products
    # eager attention computes a full square of tokens, of which a causal token t needs t + 1 columns
    square = 4 * shape.d_model * SEQLEN * SEQLEN * shape.n_layer
    assert sum(counted.values()) == 2 * square
    assert attention == square * (SEQLEN + 1) / (2 * SEQLEN)


def test_a_mamba_does_the_products_counted():
    model, _ = load("random:micro")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        import transformers

        twin = transformers.MambaForCausalLM(transformers.MambaConfig(**model.config.to_hf("float32")))
        twin(torch.zeros(2, SEQLEN, dtype=torch.int64), use_cache=False)
    products, _ = costs.forward_flops("mambacus", "micro", SEQLEN, logits=SEQLEN)
    linear = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm", "aten.bmm")
    )
    # bmm: dt_proj, and the output of the scan (C h, 2 d_inner d_state), which we count with the scan
    scan_output = 2 * SEQLEN * model.config.n_layer * 2 * model.config.d_inner * model.config.d_state
    assert linear == 2 * products + scan_output


def test_a_local_layer_looks_no_further_than_its_window():
    shape = shapes.TransformerShape("gpt_neo", 8, 2, 1, 16, 64, "test", window=4)
    near, far = 1 + 2 + 3 + 4 * 7, sum(range(1, 11))
    assert costs.attention_flops(shape, 10) == 4 * 8 * (near + far)
    assert costs.attention_flops(shape, 1, context=9) == 4 * 8 * (4 + 10)


@pytest.mark.parametrize("name", ["mambacus", "transformers", "pythia-micro"])
def test_state_bytes_are_those_of_the_tensors(name):
    case = Case("decode", name, "micro", "bfloat16", 3, SEQLEN, new_tokens=2)
    side = make_side(case)
    side.decode()()
    assert side.state_bytes() == costs.state_bytes(name, "micro", "bfloat16", 3, SEQLEN + 2)


@pytest.mark.parametrize(("name", "tied"), [("mambacus", True), ("transformers", True), ("pythia-micro", False)])
def test_an_untied_embedding_is_not_read(name, tied):
    side = make_side(Case("prefill", name, "micro", "float32", 1, 8))
    assert side.weights_bytes - side.read_bytes == (0 if tied else 512 * 64 * 4)


def test_one_prompt_is_read_once_for_our_samples_and_once_a_row_by_a_peer():
    def reading(name: str) -> float:
        case = Case("samples", name, "micro", "float32", 1, 100, new_tokens=8, samples=16)
        return costs.case_work(case, 0)[0][0]

    assert reading("transformers") == 16 * reading("mambacus")


def test_training_costs_three_forward_passes_and_two_in_frozen_products():
    full, lora = (
        costs.case_work(Case("train", "mambacus", "micro", "float32", 2, 32, method=method), 0)[0][0]
        for method in ("full", "lora")
    )
    products, rest = costs.forward_flops("mambacus", "micro", 32, logits=32)
    assert full == 2 * 3 * (products + rest)
    assert full - lora == 2 * products


def test_least_time_is_the_larger_of_bytes_and_operations_of_each_stage():
    ceilings = {"copy_gb_s": 1.0, "float32_gemm_gflop_s": 2.0, "bfloat16_gemm_gflop_s": 4.0}
    work = [(4e9, 1e9), (0.0, 3e9)]
    assert costs.least_ms(work, "float32", ceilings) == pytest.approx(2000 + 3000)
    assert costs.least_ms(work, "mixed", ceilings) == pytest.approx(1000 + 3000)
    assert costs.least_ms(work, "int8", ceilings) == pytest.approx(1000 + 3000)  # bytes only
