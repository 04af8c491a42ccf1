"""Published Transformer shapes that `mambacus bench` sets beside a Mamba of about the same size; weights are random."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """The numbers of a published ``config.json`` that decide speed and memory.

    Attributes:
        family: transformers' ``model_type``.
        d_model: width of the residual stream.
        n_layer: number of blocks.
        n_head: attention heads.
        vocab_size: rows of the embedding.
        positions: longest published context; learned positions are widened where more is measured.
        source: model hub id whose ``config.json`` has these numbers.
        d_embed: width of the embeddings where it is not ``d_model`` (OPT 350m).
        window: tokens that every second layer looks back at; 0: all (GPT-Neo has 256).
        tied: the output head is the embedding matrix.
    """

    family: str
    d_model: int
    n_layer: int
    n_head: int
    vocab_size: int
    positions: int
    source: str
    d_embed: int = 0
    window: int = 0
    tied: bool = True

    def config(self, positions: int = 0) -> Any:
        """Return transformers' configuration, with room for at least ``positions`` tokens."""
        import transformers

        room = max(self.positions, positions)
        return transformers.AutoConfig.for_model(self.family, **_KEYS[self.family](self, room), use_cache=True)


def _neox(shape: TransformerShape, room: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.d_model, "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
        "intermediate_size": 4 * shape.d_model, "vocab_size": shape.vocab_size, "max_position_embeddings": room,
        "rotary_pct": 0.25, "use_parallel_residual": True, "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def _opt(shape: TransformerShape, room: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.d_model, "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
        "ffn_dim": 4 * shape.d_model, "vocab_size": shape.vocab_size, "max_position_embeddings": room,
        "word_embed_proj_dim": shape.d_embed or shape.d_model, "do_layer_norm_before": not shape.d_embed,
    }  # fmt: skip


def _gpt_neo(shape: TransformerShape, room: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.d_model, "num_layers": shape.n_layer, "num_heads": shape.n_head,
        "attention_types": [[["global", "local"], shape.n_layer // 2]], "window_size": shape.window,
        "vocab_size": shape.vocab_size, "max_position_embeddings": room,
    }  # fmt: skip


def _gpt2(shape: TransformerShape, room: int) -> dict[str, Any]:
    return {
        "n_embd": shape.d_model, "n_layer": shape.n_layer, "n_head": shape.n_head, "vocab_size": shape.vocab_size,
        "n_positions": room,
    }  # fmt: skip


_KEYS = {"gpt_neox": _neox, "opt": _opt, "gpt_neo": _gpt_neo, "gpt2": _gpt2}
# where LoRA goes: the products beside the sequence mixer, as in_proj and out_proj are in Mamba
LORA_TARGETS = {
    "gpt_neox": ("query_key_value", "dense"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gpt_neo": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gpt2": ("c_attn", "attn.c_proj"),
}

_pythia = functools.partial(TransformerShape, "gpt_neox", positions=2048, tied=False)
_opt_shape = functools.partial(TransformerShape, "opt", vocab_size=50272, positions=2048)
_neo = functools.partial(TransformerShape, "gpt_neo", vocab_size=50257, positions=2048, window=256)
_gpt = functools.partial(TransformerShape, "gpt2", vocab_size=50257, positions=1024)

SHAPES: dict[str, TransformerShape] = {
    "pythia-micro": _pythia(64, 2, 4, 512, source="none: for tests, beside random:micro"),
    "pythia-tiny": _pythia(256, 4, 4, 4096, source="none: for trials, beside random:tiny"),
    "pythia-70m": _pythia(512, 6, 8, 50304, source="EleutherAI/pythia-70m"),
    "pythia-160m": _pythia(768, 12, 12, 50304, source="EleutherAI/pythia-160m"),
    "pythia-410m": _pythia(1024, 24, 16, 50304, source="EleutherAI/pythia-410m"),
    "pythia-1b": _pythia(2048, 16, 8, 50304, source="EleutherAI/pythia-1b"),
    "pythia-1.4b": _pythia(2048, 24, 16, 50304, source="EleutherAI/pythia-1.4b"),
    "pythia-2.8b": _pythia(2560, 32, 32, 50304, source="EleutherAI/pythia-2.8b"),
    "opt-125m": _opt_shape(768, 12, 12, source="facebook/opt-125m"),
    "opt-350m": _opt_shape(1024, 24, 16, source="facebook/opt-350m", d_embed=512),
    "opt-1.3b": _opt_shape(2048, 24, 32, source="facebook/opt-1.3b"),
    "opt-2.7b": _opt_shape(2560, 32, 32, source="facebook/opt-2.7b"),
    "gpt-neo-125m": _neo(768, 12, 12, source="EleutherAI/gpt-neo-125m"),
    "gpt-neo-1.3b": _neo(2048, 24, 16, source="EleutherAI/gpt-neo-1.3B"),
    "gpt-neo-2.7b": _neo(2560, 32, 20, source="EleutherAI/gpt-neo-2.7B"),
    "gpt2": _gpt(768, 12, 12, source="openai-community/gpt2"),
    "gpt2-medium": _gpt(1024, 24, 16, source="openai-community/gpt2-medium"),
    "gpt2-large": _gpt(1280, 36, 20, source="openai-community/gpt2-large"),
    "gpt2-xl": _gpt(1600, 48, 25, source="openai-community/gpt2-xl"),
}  # fmt: skip

MATCHED = {
    "micro": "pythia-micro",
    "tiny": "pythia-tiny",
    "130m": "pythia-160m",
    "370m": "pythia-410m",
    "790m": "pythia-1b",
    "1.4b": "pythia-1.4b",
    "2.8b": "pythia-2.8b",
}  # Mamba size -> the Transformer of its size class (Mamba paper, table 3)
