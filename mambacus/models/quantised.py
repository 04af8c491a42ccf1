"""Weight-only quantisation of a Mamba for decoding on a CPU, and what it costs in perplexity.

Quantised are the large matrices: ``in_proj``, ``x_proj`` and ``out_proj`` of every block, and the output head with the
embedding that is tied to it, which are int8 in either format. The convolution, ``dt_proj``, ``A_log``, ``D`` and the
norms stay as they are: a few hundredths of the weights, to which the recurrence is sensitive.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambacus.models.mamba import MambaLM
from mambacus.ops.quantised_linear import FORMATS, Packed, pack, quantised_linear, quantised_rows
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import read_jsonl

QUANTISED = ("in_proj", "x_proj", "out_proj")
HEAD_FORMAT = "int8"  # of head and embedding, also under int4: in tiny they alone cost half of what all in int4 does
SAMPLED_TOKENS = 128  # of one passage a book of the packaged English text: on them the cost is measured
_PIECE = 64  # tokens read at once there: so many run the kernel of decoding


class QuantisedLinear(nn.Module):
    """A linear layer with quantised weights: few bytes to read for each token, no gradient, no training.

    Args:
        layer: what it replaces.
        format: a key of `FORMATS`.
    """

    def __init__(self, layer: nn.Linear, format: str) -> None:
        super().__init__()
        packed = pack(layer.weight, format)
        self.format, self.in_features, self.out_features = packed.format, layer.in_features, layer.out_features
        self.codes = nn.Parameter(packed.codes, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Packed:
        """The weights."""
        return Packed(self.format, self.codes, self.scales, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with ``x`` (..., in_features), (..., out_features) in its dtype."""
        return quantised_linear(x, self.packed, self.bias)

    def rows(self, numbers: Tensor) -> Tensor:
        """Return rows of the weights, float32 (..., in_features), given their numbers, int64 or int32 (...)."""
        return quantised_rows(self.packed, numbers)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{self.format.name}, in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow the model to another device, but not to another dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class QuantisedEmbedding(nn.Module):
    """The embedding that is tied to a quantised output head: it looks up the head's rows.

    Args:
        head: the output head.
        dtype: of what it gives.
    """

    def __init__(self, head: QuantisedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.dtype = head, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (batch, seqlen, d_model) of ``input_ids``, int64 or int32 (batch, seqlen).

        Raises:
            IndexError: an id is negative or not below the size of the vocabulary.
        """
        return self.head.rows(input_ids).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What was quantised and what it costs.

    Attributes:
        format: ``int8`` or ``int4``.
        bytes_before: bytes of all parameters.
        bytes_after: the same, quantised.
        tokens: scored tokens of the packaged English text; 0 for a model without a tokenizer.
        perplexity_before: of a token, None if not measured.
        perplexity_after: the same, quantised.
    """

    format: str
    bytes_before: int
    bytes_after: int
    tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    def __str__(self) -> str:
        """Return one line for the user."""
        size = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        if self.perplexity_before is None or self.perplexity_after is None:
            return f"{self.format} weights: {size}; cost in perplexity not measured: the model has no tokenizer"
        change = 100 * (self.perplexity_after / self.perplexity_before - 1)
        return (
            f"{self.format} weights: {size}; perplexity of {self.tokens} tokens of English text "
            f"{self.perplexity_before:.3f} -> {self.perplexity_after:.3f} ({change:+.2f}%)"
        )


def quantise(model: MambaLM, format: str) -> Quantisation:
    """Quantise the large matrices of ``model`` in place; nothing of it can be trained any more.

    Raises:
        UserError: an unknown format, a model on another device than a CPU, with an adapter, or quantised before.
    """
    check_format(format, model.device)
    if model.quantisation is not None:
        raise UserError(f"weights: the model's are {model.quantisation.format} already")
    before = _bytes(model)
    targets = {name: module for name, module in model.named_modules() if name.endswith((*QUANTISED, "lm_head"))}
    foreign = [name for name, module in targets.items() if not isinstance(module, nn.Linear)]
    if foreign or model.adapter is not None:
        raise UserError("weights: cannot be quantised under an adapter; merge it first")
    model.requires_grad_(False)
    dtype = model.dtype
    for name, module in targets.items():
        parent, _, last = name.rpartition(".")
        chosen = HEAD_FORMAT if last == "lm_head" else format
        setattr(model.get_submodule(parent), last, QuantisedLinear(module, chosen))
    if model.config.tie_embeddings:
        head: Any = model.lm_head
        setattr(model.backbone, "embeddings", QuantisedEmbedding(head, dtype))  # noqa: B010 -- another class of module
    model.quantisation = Quantisation(format, before, _bytes(model))
    return model.quantisation


def quantise_and_measure(model: MambaLM, tokenizer: Any, format: str) -> Quantisation:
    """Do as `quantise`, and measure the perplexity of a text before and after.

    Raises:
        UserError: as `quantise`.
    """
    check_format(format, model.device)
    if tokenizer is None:
        return quantise(model, format)
    documents = [_tokens(tokenizer, text) for text in _passages()]
    before = perplexity(model, documents)
    found = quantise(model, format)
    tokens = sum(len(ids) - 1 for ids in documents)
    model.quantisation = dataclasses.replace(
        found, tokens=tokens, perplexity_before=before, perplexity_after=perplexity(model, documents)
    )
    return model.quantisation


def quantisation_record(model: nn.Module) -> dict[str, Any]:
    """Return what was done to a model's weights, for a record; the model may stand in a `PrimedModel`.

    Raises:
        AttributeError: nothing was done to them.
    """
    base: Any = model if isinstance(model, MambaLM) else model.model
    return dataclasses.asdict(base.quantisation)


def check_format(format: str, device: torch.device) -> None:
    """Check that weights of this format can be had on a device.

    Raises:
        UserError: they cannot.
    """
    if format not in FORMATS:
        raise UserError(f"weights: expected {' or '.join(FORMATS)}, got {format!r}{suggest(format, FORMATS)}")
    if device.type != "cpu":
        raise UserError(f"weights {format}: for a CPU, got device {device}; there take --dtype bfloat16")


@torch.inference_mode()
def perplexity(model: nn.Module, documents: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of a token, the first of each document aside, read as decoding reads: few at once."""
    loss, count = 0.0, 0
    for ids in documents:
        state = None
        for first in range(0, len(ids) - 1, _PIECE):
            piece = torch.tensor(ids[first : first + _PIECE + 1])
            out = model(piece[None, :-1], state=state)
            loss += F.cross_entropy(out.logits[0].float(), piece[1:], reduction="sum").item()
            count += len(piece) - 1
            state = out.state
    return math.exp(loss / count)


def _passages() -> list[str]:
    """Return one passage of each book of the packaged text."""
    with importlib.resources.as_file(
        importlib.resources.files("mambacus.data") / "text_sample" / "passages.jsonl"
    ) as path:
        rows = [row for _, row in read_jsonl(Path(path))]
    return list({row["title"]: row["text"] for row in rows}.values())


def _tokens(tokenizer: Any, text: str) -> list[int]:
    start = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return (start + tokenizer.encode(text))[: SAMPLED_TOKENS + 1]


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
