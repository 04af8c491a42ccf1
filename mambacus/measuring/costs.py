"""What a case must cost: floating-point operations, bytes moved, bytes of state, and the least time a machine needs.

Counted from shapes alone. A product-sum counts 2; norms, activations, embeddings and rotations are left out.
"""

from __future__ import annotations

from typing import Any

from mambacus.measuring.cases import Case
from mambacus.measuring.shapes import SHAPES, TransformerShape
from mambacus.models import MambaConfig, load_config
from mambacus.models.counting import count_flops

_ITEM_BYTES = {"float32": 4.0, "mixed": 4.0, "bfloat16": 2.0, "float16": 2.0}
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj", "lm_head")  # of Mamba, as `count_flops` names them
_GEMM_CEILING = {"float32": "float32_gemm_gflop_s"} | dict.fromkeys(
    ("mixed", "bfloat16", "float16"), "bfloat16_gemm_gflop_s"
)

Work = tuple[float, float]  # floating-point operations, bytes read and written


def products_flops(shape: TransformerShape) -> tuple[int, int]:
    """Return the operations of one token in a Transformer's weight matrices: in the layers, in the output head."""
    layers = 24 * shape.d_model**2 * shape.n_layer  # 4 d² of attention and 8 d² of the MLP, twice
    projections = 4 * shape.d_embed * shape.d_model  # OPT 350m's into and out of the narrow embeddings
    return layers + projections, 2 * (shape.d_embed or shape.d_model) * shape.vocab_size


def attention_flops(shape: TransformerShape, tokens: int, context: int = 0) -> int:
    """Return the operations of scores and weighted sums for ``tokens`` after ``context`` others, in all layers.

    Only what a causal model needs: the token at position t looks at t + 1 keys. ``scaled_dot_product_attention`` may
    compute more.
    """
    local = shape.n_layer // 2 if shape.window else 0
    seen = sum(range(context + 1, context + tokens + 1))
    near = sum(min(t, shape.window) for t in range(context + 1, context + tokens + 1)) if local else 0
    return 4 * shape.d_model * ((shape.n_layer - local) * seen + local * near)


def forward_flops(name: str, model: str, tokens: int, *, context: int = 0, logits: int) -> tuple[int, int]:
    """Return the operations of one row's forward pass: in products with weights, in all the rest.

    Args:
        name: the implementation; a Transformer if it is one of `SHAPES`, else a Mamba of size ``model``.
        model: size of the Mamba.
        tokens: tokens read.
        context: tokens read before them.
        logits: positions whose logits are computed.
    """
    if name in SHAPES:
        layers, head = products_flops(SHAPES[name])
        return layers * tokens + head * logits, attention_flops(SHAPES[name], tokens, context)
    flops = count_flops(load_config(f"random:{model}"))
    products = sum(flops[part] for part in _PRODUCTS if part != "lm_head")
    rest = flops["total"] - products - flops["lm_head"]
    return products * tokens + flops["lm_head"] * logits, rest * tokens


def state_bytes(name: str, model: str, dtype: str, rows: int, context: int) -> float:
    """Return the bytes that ``rows`` rows remember after ``context`` tokens.

    A Transformer's keys and values grow with the context; a Mamba's state does not. Its scan state is float32, and so
    is all state beside quantised weights.
    """
    item = _ITEM_BYTES.get(dtype, 4.0)
    if name in SHAPES:
        return 2 * SHAPES[name].n_layer * SHAPES[name].d_model * context * rows * item
    config: MambaConfig = load_config(f"random:{model}")
    return rows * config.n_layer * config.d_inner * (config.d_conv * item + config.d_state * 4.0)


def case_work(case: Case, read_bytes: float) -> list[Work]:
    """Return the stages of one run of a case, each with its operations and the bytes it must move.

    Args:
        case: what is run.
        read_bytes: bytes of the weights that every pass reads (all but an untied embedding).

    A decoding step reads the weights and the state and writes what changes of it: all of a Mamba's, one token's keys
    and values of a Transformer's. Activations are not counted. Training reads the weights forward and backward and,
    where they are trained, writes their gradients; a backward pass costs twice a forward one, but once in the frozen
    matrices under LoRA, whose own small products are left out.
    """
    name, model, rows = case.implementation, case.model, case.samples or case.batch
    if case.benchmark == "train":
        products, rest = forward_flops(name, model, case.seqlen, logits=case.seqlen)
        lora = case.method == "lora"
        flops = case.batch * ((2 if lora else 3) * products + 3 * rest)
        return [(flops, (2 if lora else 3) * read_bytes)]
    logits = case.seqlen if case.logits == "all" and case.benchmark == "prefill" else 1
    read_rows = 1 if case.samples and name == "mambacus" else rows
    prefill = (read_rows * sum(forward_flops(name, model, case.seqlen, logits=logits)), read_bytes)
    if case.benchmark == "prefill":
        return [prefill]
    steps = case.new_tokens - (case.benchmark != "decode")  # reading the prompt gives the first token
    flops = rows * sum(forward_flops(name, model, steps, context=case.seqlen, logits=steps))
    middle = state_bytes(name, model, case.dtype, rows, case.seqlen + steps // 2)
    decode = (flops, steps * (read_bytes + middle * (1 if name in SHAPES else 2)))
    return [decode] if case.benchmark == "decode" else [prefill, decode]


def least_ms(work: list[Work], dtype: str, ceilings: dict[str, float]) -> float:
    """Return the least time of some stages on a machine, from its measured ceilings.

    Each stage takes at least the time to move its bytes at the speed of a large copy, and at least the time of its
    operations at the speed of a large matrix product. For quantised weights, whose products this machine's ceilings do
    not tell, only bytes count.
    """
    rate = ceilings[_GEMM_CEILING[dtype]] if dtype in _GEMM_CEILING else None
    return sum(max(moved / ceilings["copy_gb_s"] / 1e6, flops / rate / 1e6 if rate else 0.0) for flops, moved in work)


def with_limits(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """Return a measured row with ``least_ms`` and ``of_least``, the share of the measured time it is."""
    work = row.get("work")
    if not work:
        return row
    least = least_ms(work, row["dtype"], ceilings)
    return row | {"least_ms": float(f"{least:.5g}"), "of_least": float(f"{least / row['median_ms']:.4g}")}
