"""The two arms: a Mamba and a Transformer with equally many parameters, and what a token costs each.

The Transformer is transformers' Llama: rotary positions, RMSNorm, gated MLP, no biases (the "Transformer++" of the
Mamba paper), attention by ``scaled_dot_product_attention``. Both arms tie the output head to the embeddings and start
alike: normal embeddings of deviation ``1 / sqrt(width)``, torch's own initial linear layers, and what writes to the
residual stream divided by the root of the number of writers. The usual 0.02 is meant for wide models: in narrow ones
the layers' outputs drown the embeddings, and a Transformer of width 64 (one seed) was still guessing at four pairs of
`mqar` after 1000 steps that it recalls in 200 with these. A Mamba block has about half the parameters of a Transformer
layer of its width, so twice as many make the widths alike.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from mambacus.models import MambaConfig, MambaLM
from mambacus.runtime.errors import UserError

TOLERANCE = 0.01  # of the wanted parameters, so that two arms differ by no more than twice that
_D_CONV = 4
_MLP_RATIO = 8 / 3  # Llama's: a gated MLP of this width has the parameters of a plain one of 4


@dataclasses.dataclass(frozen=True)
class Arm:
    """One architecture at one size.

    Attributes:
        name: ``mamba`` or ``transformer``.
        layers: Mamba blocks or Transformer layers.
        width: ``d_model``.
        parameters: without embeddings.
        d_state: numbers in the state of one channel; None for the Transformer.
        mlp_width: of the Transformer; 0 for Mamba.
        head_dim: of the Transformer; 0 for Mamba.
    """

    name: str
    layers: int
    width: int
    parameters: int
    d_state: int | None = None
    mlp_width: int = 0
    head_dim: int = 0

    @property
    def key(self) -> str:
        """A name that no other arm of a study has: ``transformer``, ``mamba-d16``."""
        return self.name if self.d_state is None else f"{self.name}-d{self.d_state}"

    def flops_per_token(self, seqlen: float, vocab_size: int, scored: float) -> int:
        """Return the floating-point operations of a training token, three times those of the forward pass.

        A product-sum counts 2, a step of one state of the scan 7 (as in ``mambacus info``), attention looks at half the
        row on average.

        Args:
            seqlen: tokens of a row, on average.
            vocab_size: rows of the output head.
            scored: share of the tokens whose logits are computed.
        """
        forward = 2.0 * self.parameters + 2 * scored * self.width * vocab_size
        if self.name == "mamba":
            forward += 7 * self.layers * 2 * self.width * (self.d_state or 0)
        else:
            forward += 4 * self.layers * self.width * seqlen / 2
        return round(3 * forward)

    def memory_numbers(self, seqlen: int) -> int:
        """Return the numbers that hold the past after ``seqlen`` tokens: states, or keys and values."""
        if self.name == "mamba":
            return self.layers * 2 * self.width * ((self.d_state or 0) + _D_CONV)
        return self.layers * 2 * self.width * seqlen


def mamba_parameters(width: int, layers: int, d_state: int) -> int:
    """Return the parameters of a Mamba without embeddings."""
    inner, rank = 2 * width, math.ceil(width / 16)
    block = (
        3 * width * inner  # in_proj, out_proj
        + inner * (_D_CONV + 1)  # conv1d
        + inner * (rank + 2 * d_state)  # x_proj
        + inner * (rank + 1)  # dt_proj
        + inner * (d_state + 1)  # A_log, D
        + width  # norm
    )
    return layers * block + width


def transformer_parameters(width: int, layers: int, mlp_width: int) -> int:
    """Return the parameters of a Llama without embeddings."""
    return layers * (4 * width**2 + 3 * width * mlp_width + 2 * width) + width


def size_mamba(parameters: int, layers: int, d_state: int) -> Arm:
    """Return the Mamba of this many parameters: the roundest width that meets them within `TOLERANCE`.

    Raises:
        UserError: no width does.
    """
    widest = math.isqrt(parameters) + 8  # a block alone has more than 6 * width^2
    for step in (16, 8, 4, 2, 1):
        widths = range(step, widest + step, step)
        width = min(widths, key=lambda width: abs(mamba_parameters(width, layers, d_state) - parameters))
        found = mamba_parameters(width, layers, d_state)
        if abs(found - parameters) <= TOLERANCE * parameters:
            return Arm("mamba", layers, width, found, d_state)
    raise _misfit(f"{layers} Mamba blocks of d_state {d_state}", parameters, found)


def size_transformer(parameters: int, layers: int, head_dim: int) -> Arm:
    """Return the Transformer of this many parameters: whole heads, and an MLP whose width takes up the rest.

    Raises:
        UserError: no shape does within `TOLERANCE`.
    """
    best: tuple[float, Arm] | None = None
    for heads in range(1, math.isqrt(parameters) // head_dim + 2):
        width = heads * head_dim
        rest = (parameters - width) / layers - 4 * width**2 - 2 * width
        mlp_width = max(1, round(rest / (3 * width)))
        even = 8 * max(1, round(mlp_width / 8))
        if abs(transformer_parameters(width, layers, even) - parameters) <= TOLERANCE * parameters:
            mlp_width = even
        found = transformer_parameters(width, layers, mlp_width)
        distance = abs(math.log(mlp_width / width / _MLP_RATIO))
        if abs(found - parameters) <= TOLERANCE * parameters and (best is None or distance < best[0]):
            best = distance, Arm("transformer", layers, width, found, None, mlp_width, head_dim)
    if best is None:
        raise _misfit(f"{layers} Transformer layers with heads of {head_dim}", parameters, None)
    return best[1]


def _misfit(what: str, parameters: int, found: int | None) -> UserError:
    near = f"; the nearest has {found:,}" if found else ""
    return UserError(f"arms: no width gives {what} {parameters:,} parameters within {TOLERANCE:.0%}{near}")


class Learner(nn.Module):
    """A model that gives logits just where they are scored, the same way for both arms."""

    def __init__(self, arm: Arm, vocab_size: int, longest: int) -> None:
        super().__init__()
        self.is_mamba = arm.name == "mamba"
        self.model: Any = _mamba(arm, vocab_size) if self.is_mamba else _transformer(arm, vocab_size, longest)

    def forward(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """Return float32 logits (batch, places, vocabulary).

        Args:
            input_ids: int64 (batch, seqlen), filled at the right, where nothing can reach back from.
            places: int64 (batch, places), positions whose next token is predicted.
        """
        if self.is_mamba:
            hidden, _, _ = self.model.backbone(input_ids, None, None, checkpointing=False)
        else:
            hidden = self._transformer_states(input_ids)
        wanted = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))  # (batch, places, width)
        logits: Tensor = self.model.lm_head(wanted)
        return logits.float()

    def _transformer_states(self, input_ids: Tensor) -> Tensor:
        """Return (batch, seqlen, width), layer by layer: Llama's own forward reads its positions back from the device.

        It asks them whether a row is several documents. With a graph being recorded it cannot ask and builds a mask,
        which costs the fast attention; without a mask attention is causal.
        """
        llama = self.model.model
        hidden: Tensor = llama.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotations = llama.rotary_emb(hidden, position_ids=positions)
        for layer in llama.layers:
            hidden = layer(
                hidden, attention_mask=None, position_embeddings=rotations, position_ids=positions, use_cache=False
            )
        normed: Tensor = llama.norm(hidden)
        return normed


def build(arm: Arm, vocab_size: int, longest: int, seed: int) -> Learner:
    """Return a float32 model on the CPU with initial weights drawn from ``seed``; torch's generator is left as it was.

    Args:
        arm: architecture and size.
        vocab_size: number of tokens.
        longest: tokens of the longest row it will read.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learner(arm, vocab_size, longest)


def _mamba(arm: Arm, vocab_size: int) -> MambaLM:
    assert arm.d_state is not None
    shape = MambaConfig(
        d_model=arm.width, n_layer=arm.layers, vocab_size=vocab_size, d_state=arm.d_state,
        initializer_range=arm.width**-0.5,
    )  # fmt: skip
    return MambaLM(shape)


def _transformer(arm: Arm, vocab_size: int, longest: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = arm.width // arm.head_dim
    shape: Any = LlamaConfig(  # type: ignore[call-arg]  # transformers' types leave out its common keys
        vocab_size=vocab_size, hidden_size=arm.width, intermediate_size=arm.mlp_width, num_hidden_layers=arm.layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=arm.head_dim, max_position_embeddings=longest,
        tie_word_embeddings=True, initializer_range=arm.width**-0.5, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()  # as Mamba's
            layer.self_attn.o_proj.weight /= math.sqrt(2 * arm.layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * arm.layers)
    return model
