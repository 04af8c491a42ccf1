"""The shape of a Mamba model, and its two spellings on disk: Hugging Face's and the original authors'.

Our terms are the paper's (``d_model``, ``d_state`` ...); `_HF_KEYS` and `_SSM_CFG_KEYS` map them to the keys of the two
``config.json`` formats. A key or value that this model cannot honour is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mambacus.runtime.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Shape, numerics and initialisation of a Mamba language model.

    Attributes:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        vocab_size: number of tokens.
        d_state: numbers in the state of one channel (N in the paper).
        d_conv: taps of the causal convolution.
        expand: ``d_inner = expand * d_model``.
        dt_rank: rank of the step projection; ``"auto"`` is ``ceil(d_model / 16)``. Always an int once constructed.
        pad_vocab_size_multiple: the embedding has ``vocab_size`` rows rounded up to a multiple of this.
        tie_embeddings: the output head is the embedding matrix.
        norm_eps: added to the mean square in RMSNorm.
        use_bias: ``in_proj`` and ``out_proj`` have a bias.
        use_conv_bias: the convolution has a bias.
        residual_in_fp32: the residual stream is float32 in a model of lower precision.
        dt_min: smallest step at initialisation, in units of the sequence's clock.
        dt_max: largest step at initialisation.
        dt_init: initial ``dt_proj.weight``: ``random`` (uniform) or ``constant``.
        dt_scale: factor on the range of the initial ``dt_proj.weight``.
        dt_init_floor: lower bound of the initial step.
        initializer_range: standard deviation of the initial embeddings.
        rescale_prenorm_residual: divide the initial ``out_proj.weight`` by ``sqrt(n_layer)``.
        bos_token_id: id of the token that starts a document, None if the model has none.
        eos_token_id: id of the token that ends a document (or several), None if the model has none.
        pad_token_id: id written at padding positions; it is never read.

    Raises:
        UserError: a size is not a positive integer or a choice is unknown.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752), section 3 and appendix E; defaults as in ``state-spaces/mamba``.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = "auto"  # type: ignore[assignment]  # resolved to an int in __post_init__
    pad_vocab_size_multiple: int = 1
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        if self.dt_rank == "auto":
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "dt_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model config: {name}: expected a positive integer, got {value!r}")
        if self.pad_vocab_size_multiple < 1:
            raise UserError(
                f"model config: pad_vocab_size_multiple: expected >= 1, got {self.pad_vocab_size_multiple!r}"
            )
        for name in ("norm_eps", "dt_min", "dt_max", "dt_scale", "dt_init_floor", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model config: {name}: expected a number above 0, got {getattr(self, name)!r}")
        if self.dt_init not in ("random", "constant"):
            raise UserError(f"model config: dt_init: expected random or constant, got {self.dt_init!r}")

    @property
    def d_inner(self) -> int:
        """Width of the scan: ``expand * d_model``."""
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def model_type(self) -> str:
        """A name of our own: PEFT refuses ``out_proj`` adapters on ``mamba``, whose fused path would skip them."""
        return "mambacus"

    @property
    def tie_word_embeddings(self) -> bool:
        """The name under which PEFT asks for ``tie_embeddings``."""
        return self.tie_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, with the two keys PEFT looks up."""
        return dataclasses.asdict(self) | {
            "model_type": self.model_type,
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> MambaConfig:
        """Read a ``config.json`` of either format.

        Args:
            values: the parsed file.
            where: name of the file, for messages.

        Raises:
            UserError: another architecture, an unknown key, or a value this model cannot honour; all are named.
        """
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, got a {type(values).__name__}")
        if "model_type" in values:
            return cls._from_hf(values, where)
        if {"d_model", "n_layer"} <= set(values):
            return cls._from_original(values, where)
        raise UserError(
            f"{where}: expected a Mamba config with 'model_type' (Hugging Face format) or 'd_model' and 'n_layer' "
            f"(original format), got the keys {', '.join(sorted(values)) or 'none'}"
        )

    @classmethod
    def _from_hf(cls, values: dict[str, Any], where: str) -> MambaConfig:
        if values["model_type"] != "mamba":
            raise UserError(f"{where}: expected a Mamba-1 model (model_type 'mamba'), got {values['model_type']!r}")
        known = {*_HF_KEYS.values(), *_HF_INERT, *_HF_FIXED, "intermediate_size"}
        _refuse_unknown({key for key in values if not key.startswith("_")}, known, where)
        missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in values]
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        _require(values, _HF_FIXED, where)
        config = cls._made({ours: values[key] for ours, key in _HF_KEYS.items() if key in values}, where)
        repeated = {
            "intermediate_size": config.d_inner, "d_inner": config.d_inner, "d_model": config.d_model,
            "n_layer": config.n_layer,
        }  # fmt: skip
        _require(values, {key: (value,) for key, value in repeated.items()}, where)
        return config

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """Return the ``config.json`` of transformers' ``MambaForCausalLM``.

        Args:
            dtype: name of the weights' dtype, for example ``bfloat16``.
        """
        ours = dataclasses.asdict(self)
        del ours["pad_vocab_size_multiple"]
        ours["vocab_size"] = self.padded_vocab_size  # transformers has no padding: its vocabulary is the matrix
        return {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "dtype": dtype,
            "hidden_act": "silu",
            "intermediate_size": self.d_inner,
            "use_cache": True,
            **{_HF_KEYS[name]: value for name, value in ours.items()},
            # Initialisation only, but where it is set transformers divides the loaded out_proj.weight once more.
            "rescale_prenorm_residual": False,
        }

    @classmethod
    def _from_original(cls, values: dict[str, Any], where: str) -> MambaConfig:
        _refuse_unknown(set(values), {*_ORIGINAL_KEYS, *_ORIGINAL_FIXED, "ssm_cfg", "fused_add_norm"}, where)
        if "vocab_size" not in values:
            raise UserError(f"{where}: missing vocab_size")
        _require(values, _ORIGINAL_FIXED, where)
        ssm = values.get("ssm_cfg") or {}
        _refuse_unknown(set(ssm), {*_SSM_CFG_KEYS, *_SSM_CFG_FIXED, "use_fast_path"}, f"{where}: ssm_cfg")
        _require(ssm, _SSM_CFG_FIXED, f"{where}: ssm_cfg")
        fields = {"pad_vocab_size_multiple": 8}  # the original's default
        fields |= {key: values[key] for key in _ORIGINAL_KEYS if key in values}
        fields |= {ours: ssm[key] for key, ours in _SSM_CFG_KEYS.items() if key in ssm}
        return cls._made(fields, where)

    @classmethod
    def _made(cls, fields: dict[str, Any], where: str) -> MambaConfig:
        """Return the configuration with these fields; a fault in one names the file ``where`` it stands."""
        _check_types(fields, where)
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_original(self) -> dict[str, Any]:
        """Return the ``config.json`` of the original ``state-spaces/mamba`` code.

        Raises:
            UserError: ``norm_eps`` is not 1e-5, the only value that code has.
        """
        default = {field.name: field.default for field in dataclasses.fields(self)}
        if self.norm_eps != default["norm_eps"]:
            raise UserError(f"the original format has norm_eps 1e-05 only, this model has {self.norm_eps}")
        auto_rank = math.ceil(self.d_model / 16)
        ssm = {
            key: getattr(self, ours)
            for key, ours in _SSM_CFG_KEYS.items()
            if getattr(self, ours) != (auto_rank if ours == "dt_rank" else default[ours])
        }
        return {
            "d_model": self.d_model,
            "d_intermediate": 0,
            "n_layer": self.n_layer,
            "vocab_size": self.vocab_size,
            "ssm_cfg": ssm,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": self.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": self.pad_vocab_size_multiple,
            "tie_embeddings": self.tie_embeddings,
        }


# Our name -> the key of transformers' MambaConfig.
_HF_KEYS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
    "residual_in_fp32": "residual_in_fp32",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "initializer_range": "initializer_range",
    "rescale_prenorm_residual": "rescale_prenorm_residual",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# Keys that this model honours by having just these values; the last two come from the original code.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mamba",),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "rms_norm": (True,),
    "ssm_cfg": (None, {}),
}
# Keys of transformers that do not change what this model computes. The second line repeats sizes (checked) or is of the
# original code; the others steer transformers itself.
_HF_INERT = {
    "d_inner", "d_model", "n_layer", "fused_add_norm", "pad_vocab_size_multiple",
    "architectures", "transformers_version", "dtype", "torch_dtype", "name_or_path", "use_cache", "use_mambapy",
    "use_associative_scan", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "tie_last_hidden_states", "id2label", "label2id", "num_labels", "problem_type", "torchscript", "layer_types",
    "task_specific_params", "finetuning_task", "tokenizer_class", "prefix", "attn_implementation",
}  # fmt: skip
# Keys of the original config.json with our names.
_ORIGINAL_KEYS = ("d_model", "n_layer", "vocab_size", "residual_in_fp32", "pad_vocab_size_multiple", "tie_embeddings")
_ORIGINAL_FIXED: dict[str, tuple[Any, ...]] = {
    "d_intermediate": (0,),
    "attn_layer_idx": (None, []),
    "attn_cfg": (None, {}),
    "rms_norm": (True,),
}
# Key of the original's ssm_cfg (arguments of its Mamba block) -> our name.
_SSM_CFG_KEYS = {
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "dt_rank": "dt_rank",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init": "dt_init",
    "dt_scale": "dt_scale",
    "dt_init_floor": "dt_init_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_SSM_CFG_FIXED: dict[str, tuple[Any, ...]] = {"layer": ("Mamba1",)}


def _refuse_unknown(keys: set[str], known: set[str], where: str) -> None:
    unknown = sorted(keys - known)
    if unknown:
        hint = suggest(unknown[0], known)
        raise UserError(f"{where}: unknown key {', '.join(map(repr, unknown))}: its meaning for Mamba is unclear{hint}")


def _require(values: dict[str, Any], allowed: dict[str, tuple[Any, ...]], where: str) -> None:
    wrong = [
        f"{key} {' or '.join(map(repr, good))} (got {values[key]!r})"
        for key, good in allowed.items()
        if key in values and values[key] not in good
    ]
    if wrong:
        raise UserError(f"{where}: this model needs {'; '.join(wrong)}")


def _check_types(fields: dict[str, Any], where: str) -> None:
    """Raise UserError naming the first of ``fields`` whose JSON type is not that of the field."""
    for name, value in fields.items():
        default = MambaConfig.__dataclass_fields__[name].default
        wanted: tuple[type, ...] = (int,)
        if name.endswith("token_id"):
            wanted = (int, list, type(None))
        elif name == "dt_rank" and value == "auto":
            wanted = (str,)
        elif isinstance(default, (bool, str)) and name != "dt_rank":
            wanted = (type(default),)
        elif isinstance(default, float):
            wanted = (int, float)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in wanted)
            raise UserError(f"{where}: {name}: expected {names}, got {value!r}")
        if isinstance(value, list) and not all(isinstance(part, int) for part in value):
            raise UserError(f"{where}: {name}: expected a list of token ids, got {value!r}")
