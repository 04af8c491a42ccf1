"""MambaConfig and its two spellings in config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mambacus.models import MambaConfig
from mambacus.runtime.errors import UserError

# config.json of the published checkpoints, in the Hugging Face format and in the original one.
PUBLISHED_HF: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8, "residual_in_fp32": True,
    "rescale_prenorm_residual": False, "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
    "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48,
    "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_bias": False,
    "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
PUBLISHED_ORIGINAL: dict[str, Any] = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip


def test_both_published_configs_are_the_same_model() -> None:
    hf = MambaConfig.from_json(PUBLISHED_HF, "config.json")
    original = MambaConfig.from_json(PUBLISHED_ORIGINAL, "config.json")
    assert hf.padded_vocab_size == original.padded_vocab_size == 50280
    for name in ("d_model", "n_layer", "d_inner", "d_state", "d_conv", "dt_rank", "tie_embeddings", "norm_eps"):
        assert getattr(hf, name) == getattr(original, name)
    assert (hf.d_inner, hf.dt_rank) == (1536, 48)


def test_what_transformers_writes_today_is_read() -> None:
    import transformers

    theirs = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, tie_word_embeddings=False)
    for written in (theirs.to_dict(), theirs.to_diff_dict() | {"hidden_size": 32, "vocab_size": 50}):
        written = {"num_hidden_layers": 2, "model_type": "mamba", **written}
        config = MambaConfig.from_json(written, "config.json")
        assert (config.d_model, config.n_layer, config.tie_embeddings) == (32, 2, False)


CHANGED = {
    "d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 7, "tie_embeddings": False, "use_bias": True,
    "use_conv_bias": False, "residual_in_fp32": False, "dt_min": 0.01, "dt_max": 0.2, "dt_init": "constant",
    "dt_scale": 0.5, "dt_init_floor": 0.001,
}  # fmt: skip


def test_every_field_survives_both_formats() -> None:
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=50, **CHANGED)
    hf_only = dataclasses.replace(config, norm_eps=1e-6, eos_token_id=[3, 4], bos_token_id=None, initializer_range=0.3)
    again = MambaConfig.from_json(hf_only.to_hf("float32"), "config.json")
    assert dataclasses.replace(again, rescale_prenorm_residual=True) == hf_only
    padded = dataclasses.replace(config, pad_vocab_size_multiple=16)
    assert MambaConfig.from_json(padded.to_original(), "config.json") == padded


def test_transformers_reads_every_key_we_write() -> None:
    import transformers

    written = MambaConfig(d_model=32, n_layer=2, vocab_size=50).to_hf("bfloat16")
    known = set(transformers.MambaConfig().to_dict()) | {"intermediate_size"}
    assert set(written) <= known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "falcon_mamba"}, "expected a Mamba-1 model"),
        ({"model_type": ["mamba"]}, "expected a Mamba-1 model"),
        ({"hidden_size": -4}, "^config.json: model config: d_model: expected a positive integer, got -4$"),
        ({"layer_norm_epsilon": float("nan")}, "norm_eps: expected a number above 0, got nan"),
        ({"time_step_min": 0.0}, "dt_min: expected a number above 0, got 0.0"),
        ({"eos_token_id": ["a"]}, "eos_token_id: expected a list of token ids"),
        ({"hidden_act": "gelu"}, "needs hidden_act 'silu' \\(got 'gelu'\\)"),
        ({"rms_norm": False}, "needs rms_norm True"),
        ({"quantization_config": {"bits": 4}}, "unknown key 'quantization_config'"),
        ({"state_sise": 8}, "unknown key 'state_sise'.*did you mean 'state_size'"),
        ({"hidden_size": "768"}, "d_model: expected int, got '768'"),
        ({"use_bias": 1}, "use_bias: expected bool, got 1"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer"),
        ({"vocab_size": True}, "vocab_size: expected int, got True"),
        ({"layer_norm_epsilon": None}, "norm_eps: expected int or float"),
        ({"time_step_init_scheme": "zipf"}, "dt_init: expected random or constant"),
        ({"intermediate_size": 1000}, "needs intermediate_size 1536"),
        ({"n_layer": 3}, "needs n_layer 24"),
    ],
)
def test_what_a_hugging_face_config_cannot_say_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MambaConfig.from_json(PUBLISHED_HF | changes, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "needs layer 'Mamba1'"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg: unknown key 'headdim'"),
        ({"rms_norm": False}, "needs rms_norm True"),
        ({"attn_layer_idx": [3]}, "needs attn_layer_idx"),
        ({"d_intermediate": 2048}, "needs d_intermediate 0"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_what_an_original_config_cannot_say_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MambaConfig.from_json(PUBLISHED_ORIGINAL | changes, "config.json")


def test_files_of_neither_format_are_named() -> None:
    with pytest.raises(UserError, match=r"x/config.json: expected a Mamba config .* got the keys a, b"):
        MambaConfig.from_json({"a": 1, "b": 2}, "x/config.json")
    with pytest.raises(UserError, match="missing hidden_size, vocab_size"):
        MambaConfig.from_json({"model_type": "mamba", "num_hidden_layers": 2}, "config.json")
    with pytest.raises(UserError, match="missing vocab_size"):
        MambaConfig.from_json({"d_model": 8, "n_layer": 2}, "config.json")


def test_the_original_format_refuses_another_epsilon() -> None:
    with pytest.raises(UserError, match="norm_eps"):
        MambaConfig(d_model=32, n_layer=2, vocab_size=50, norm_eps=1e-6).to_original()


def test_sizes_are_derived_and_checked() -> None:
    config = MambaConfig(d_model=100, n_layer=2, vocab_size=50, pad_vocab_size_multiple=16)
    assert (config.dt_rank, config.d_inner, config.padded_vocab_size) == (7, 200, 64)
    with pytest.raises(UserError, match="d_state: expected a positive integer, got 0"):
        MambaConfig(d_model=8, n_layer=1, vocab_size=5, d_state=0)
    with pytest.raises(UserError, match="pad_vocab_size_multiple"):
        MambaConfig(d_model=8, n_layer=1, vocab_size=5, pad_vocab_size_multiple=0)
