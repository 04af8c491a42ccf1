"""What a model costs by its shape alone: parameters, floating-point operations of a token, bytes kept of the past.

Mamba and the four Transformer families of the study (GPT-NeoX, OPT, GPT-Neo, GPT-2), from a ``config.json``; no weights
are read. Counting rules: a product-sum is 2 operations; norms, activations and softmax are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambacus.models.config import MambaConfig
from mambacus.models.counting import count_flops, count_parameters
from mambacus.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Costs:
    """A model's shape in numbers.

    Attributes:
        family: ``mamba`` or the ``model_type`` of a Transformer.
        width: of the residual stream.
        n_layer: blocks.
        vocab_size: rows of the output head.
        parameters: by part, without a total; a tied head is 0.
        flops: of one forward token without context, by part, without a total.
        context_flops: further operations for each position that a token attends to; 0 for Mamba.
        state_numbers: numbers kept of a sequence whatever its length: ``(low, high)``, of which ``high`` are float32 in
            every dtype; 0 for Transformers.
        cache_numbers: numbers kept for each token of a sequence (keys and values); 0 for Mamba.
    """

    family: str
    width: int
    n_layer: int
    vocab_size: int
    parameters: Mapping[str, int]
    flops: Mapping[str, int]
    context_flops: int = 0
    state_numbers: tuple[int, int] = (0, 0)
    cache_numbers: int = 0

    @property
    def total_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> int:
        """Operations of one forward token without context, with logits."""
        return sum(self.flops.values())

    def state_bytes(self, size: int, seqlen: int = 0) -> int:
        """Return the bytes kept of one sequence of ``seqlen`` tokens where a number takes ``size`` bytes."""
        low, high = self.state_numbers
        return low * size + high * 4 + seqlen * self.cache_numbers * size


def mamba_costs(config: MambaConfig) -> Costs:
    """Return the costs of a Mamba model."""
    d_inner, n_layer = config.d_inner, config.n_layer
    flops = {part: count for part, count in count_flops(config).items() if part != "total"}
    return Costs(
        "mamba", config.d_model, n_layer, config.padded_vocab_size, count_parameters(config)[0], flops,
        state_numbers=(n_layer * d_inner * config.d_conv, n_layer * d_inner * config.d_state),
    )  # fmt: skip


_NAMES = {  # our term: its keys in the config.json of the families
    "width": ("hidden_size", "n_embd"),
    "n_layer": ("num_hidden_layers", "num_layers", "n_layer"),
    "inner": ("ffn_dim", "intermediate_size", "n_inner"),
    "positions": ("max_position_embeddings", "n_positions"),
}
FAMILIES = ("gpt_neox", "opt", "gpt_neo", "gpt2")


def transformer_costs(values: Mapping[str, Any], where: str) -> Costs:
    """Return the costs of a Transformer from its ``config.json``.

    Args:
        values: the parsed file.
        where: its name, for messages.

    Raises:
        UserError: another architecture, or a key that is missing or no positive integer.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type: expected mamba, {', '.join(FAMILIES)}, got {family!r}")
    width, n_layer = _size(values, "width", where), _size(values, "n_layer", where)
    inner = _size(values, "inner", where, 4 * width)
    vocab_size = values.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{where}: vocab_size: expected a positive integer, got {vocab_size!r}")
    narrow = values.get("word_embed_proj_dim", width) if family == "opt" else width  # opt-350m: 512 below 1024
    pre_norm = values.get("do_layer_norm_before", True)  # opt-350m alone has no last norm
    positions = 0 if family == "gpt_neox" else _size(values, "positions", where) + (2 if family == "opt" else 0)
    tied = values.get("tie_word_embeddings", family != "gpt_neox")
    matrices = {"attention": 4 * width * width, "mlp": 2 * width * inner}
    if narrow != width:
        matrices["project_in"] = matrices["project_out"] = narrow * width
    repeated = {part: count * (n_layer if part in ("attention", "mlp") else 1) for part, count in matrices.items()}
    biases = n_layer * ((1 if family == "gpt_neo" else 4) * width + inner + width)
    parameters = {
        **repeated,
        "bias": biases,
        "norm": 2 * width * (2 * n_layer + (1 if pre_norm else 0)),
        "embeddings": vocab_size * narrow + positions * width,
        "lm_head": 0 if tied else vocab_size * narrow,
    }
    flops = {part: 2 * count for part, count in repeated.items()} | {"lm_head": 2 * vocab_size * narrow}
    return Costs(
        family, width, n_layer, vocab_size, parameters, flops,
        context_flops=4 * width * n_layer, cache_numbers=2 * width * n_layer,
    )  # fmt: skip


def _size(values: Mapping[str, Any], term: str, where: str, default: int | None = None) -> int:
    found = next((values[key] for key in _NAMES[term] if values.get(key) is not None), default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{where}: {_NAMES[term][0]}: expected a positive integer, got {found!r}")
    return found


def _neox(width: int, n_layer: int) -> dict[str, Any]:
    return {"model_type": "gpt_neox", "hidden_size": width, "num_hidden_layers": n_layer, "vocab_size": 50304}


def _neo(width: int, n_layer: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_layers": n_layer, "vocab_size": 50257, "max_position_embeddings": 2048}
    return {"model_type": "gpt_neo", **shape}


def _opt(width: int, n_layer: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_hidden_layers": n_layer, "ffn_dim": 4 * width, "vocab_size": 50272}
    return {"model_type": "opt", **shape, "max_position_embeddings": 2048, **more}


PUBLISHED: Mapping[str, Mapping[str, Any]] = {  # hub id: what its config.json says of its shape
    "EleutherAI/pythia-70m": _neox(512, 6),
    "EleutherAI/pythia-160m": _neox(768, 12),
    "EleutherAI/pythia-410m": _neox(1024, 24),
    "EleutherAI/pythia-1b": _neox(2048, 16),
    "EleutherAI/pythia-1.4b": _neox(2048, 24),
    "EleutherAI/pythia-2.8b": _neox(2560, 32),
    "EleutherAI/gpt-neo-125m": _neo(768, 12),
    "EleutherAI/gpt-neo-1.3B": _neo(2048, 24),
    "EleutherAI/gpt-neo-2.7B": _neo(2560, 32),
    "facebook/opt-125m": _opt(768, 12),
    "facebook/opt-350m": _opt(1024, 24, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24),
    "facebook/opt-2.7b": _opt(2560, 32),
    "openai-community/gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024,
    },
}  # fmt: skip
_MAMBA_HUB = "state-spaces/mamba-"


def costs_of(name: str) -> Costs | None:
    """Return the costs of a model on this machine or of a published shape; nothing is fetched.

    Args:
        name: as in `mambacus.models.load`, or a Transformer's folder or hub id.

    Returns:
        None for a hub id that is neither published here nor in the hub's cache, and for an uncounted architecture.

    Raises:
        UserError: no such folder or random size, or a configuration that cannot be read.
    """
    from huggingface_hub import try_to_load_from_cache

    from mambacus.models.checkpoint import CONFIG_FILE, config_file
    from mambacus.models.registry import RANDOM_SIZES, is_hub_id, resolve
    from mambacus.runtime.records import read_json

    if name in PUBLISHED:
        return transformer_costs(PUBLISHED[name], name)
    size = name.removeprefix(_MAMBA_HUB).removesuffix("-hf")
    if name.startswith(_MAMBA_HUB) and size in RANDOM_SIZES:
        return mamba_costs(RANDOM_SIZES[size])
    local = name == "tiny" or name.startswith("random:") or Path(name).expanduser().exists()
    if not local and is_hub_id(name):
        cached = try_to_load_from_cache(name, CONFIG_FILE)
        if not isinstance(cached, str):
            return None
        return _from_json(read_json(Path(cached)), name)
    source = resolve(name, weights=False)
    if source.folder is None:
        return mamba_costs(RANDOM_SIZES[source.size or ""])
    path = config_file(source.folder)
    return _from_json(read_json(path), str(path))


def _from_json(values: dict[str, Any], where: str) -> Costs | None:
    if values.get("model_type", "mamba") == "mamba":
        return mamba_costs(MambaConfig.from_json(values, where))
    return transformer_costs(values, where) if values["model_type"] in FAMILIES else None
