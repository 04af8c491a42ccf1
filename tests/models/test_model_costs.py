"""Costs by shape: parameters are those that transformers builds, and what is not known is not guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mambacus.models.config import MambaConfig
from mambacus.models.costs import PUBLISHED, costs_of, transformer_costs
from mambacus.runtime.errors import UserError

HEADS = {  # transformers' defaults do not divide these widths
    "gpt_neox": lambda shape: {"intermediate_size": 4 * shape["hidden_size"]},
    "opt": lambda shape: {"num_attention_heads": shape["hidden_size"] // 64},
    "gpt_neo": lambda shape: {"attention_types": [[["global", "local"], shape["num_layers"] // 2]]},
    "gpt2": lambda shape: {},
}


@pytest.mark.parametrize("name", ["EleutherAI/pythia-160m", "EleutherAI/gpt-neo-1.3B", "facebook/opt-350m",
                                  "facebook/opt-2.7b", "openai-community/gpt2"])  # fmt: skip
def test_parameters_are_those_of_transformers(name: str) -> None:
    import transformers

    shape = dict(PUBLISHED[name])
    config = transformers.AutoConfig.for_model(**shape, **HEADS[shape["model_type"]](shape))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = transformer_costs(shape, name)
    assert found.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    matrices = [
        parameter.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        for parameter in [module.weight]
    ]
    assert found.total_flops == 2 * sum(matrices)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("EleutherAI/pythia-2.8b", 2_775_208_960), ("facebook/opt-1.3b", 1_315_758_080),
     ("state-spaces/mamba-130m-hf", 129_135_360), ("state-spaces/mamba-2.8b", 2_768_345_600)],
)  # fmt: skip
def test_published_models_are_known_without_a_hub(name: str, parameters: int) -> None:
    found = costs_of(name)
    assert found is not None and found.total_parameters == parameters


def test_what_a_sequence_keeps() -> None:
    mamba, pythia = costs_of("random:130m"), costs_of("EleutherAI/pythia-160m")
    assert mamba is not None and pythia is not None
    assert mamba.state_bytes(2) == mamba.state_bytes(2, 4096) == 24 * 1536 * (4 * 2 + 16 * 4)
    assert pythia.state_bytes(2, 1000) == 1000 * 12 * 2 * 768 * 2
    assert (mamba.context_flops, pythia.context_flops) == (0, 4 * 768 * 12)


def test_what_is_not_known_is_none(tmp_path: Path) -> None:
    assert costs_of("nobody/no-such-model") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 9}))
    assert costs_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(
        json.dumps(MambaConfig(d_model=64, n_layer=2, vocab_size=512).to_hf("float32"))
    )
    found = costs_of(str(tmp_path))
    assert found is not None and found.total_parameters == 98_240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers: expected a positive integer, got '12'"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, got 0"),
        ({"model_type": "bloom"}, "model_type: expected mamba, gpt_neox, opt, gpt_neo, gpt2, got 'bloom'"),
    ],
)
def test_broken_shapes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match="here: " + message):
        transformer_costs({**PUBLISHED["EleutherAI/pythia-160m"], **change}, "here")
