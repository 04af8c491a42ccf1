"""One token through a Mamba-1 on an NVIDIA GPU: the launches of ``step.cu``.

Few rows run on its kernels alone, four for each layer; more rows leave the large products to torch, many rows all
products. Results are the same run to run: no atomics. The kernels read weights and states before they wait for the
kernel before them; the first one of a step is launched plainly and waits for all that was queued before.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.ops import nvrtc
from mambacus.ops.decode_step.interface import LayerWeights, StepWeights
from mambacus.ops.linear.gpu import float32_product
from mambacus.ops.nvrtc import MOST_BLOCKS, Launch, Program
from mambacus.ops.rms_norm import add_rms_norm, rms_norm

FEW_ROWS = 48  # up to here the own products are used
# Bytes of the next product's weight that each product asks L2 for: out_proj while convolve and update leave the memory
# idle; of in_proj, or the head, what is read while one product ends and the next begins.
AHEAD = {"in": 24 << 20, "out": 8 << 20, "head": 0}
AHEAD_ROWS = 8  # more rows are slower with it
# Beyond, up to `ASKING_ROWS` of a model with an in_proj of `LEAST_ASKED` bytes: bytes of out_proj that ``convolve``
# asks for, and of the next in_proj that the last blocks of ``update`` do. 370m was slower with it.
ASKED = {"convolve": 8 << 20, "update": 4 << 20}
ASKING_ROWS, LEAST_ASKED = 32, 32 << 20
FUSED_ROWS = 128  # up to here x_proj, dt_proj and norms are own kernels, which read their inputs again for 8 rows each
MOST_ROWS = 2 * MOST_BLOCKS  # ``update`` takes at least two a block
_D_CONV = 4
_D_STATES = (8, 16, 32, 64)
_MOST_OUTPUTS = 16 * 24  # of x_proj: a warp for 16, at most 768 threads
_CONV_ROWS = 8
_NORM_THREADS = 512  # at most, of a row: four elements each up to a d_model of 2048
_THREADS_AT_ONCE = 132 * 512  # of ``update`` on an H100, by their registers
_ASKERS = 64  # the last blocks of a launch
_KINDS = {"in": 0, "out": 1, "head": 2}
_SOURCE = Path(__file__).with_name("step.cu")
_Args = nvrtc.struct(
    "tokens counts embedding norm weight x next y normed residual squares taps taps_bias xz conv_state mixed part"
    " projected delta dt_weight delta_bias A_log D ssm_state",
    "", "batch", floats="eps",
)  # fmt: skip


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        m_tiles: tiles of 16 outputs of a block.
        warps: of a block, sharing the inputs.
        ring: pieces of 32 inputs that a warp holds in registers.
        min_blocks: of a multiprocessor, which bounds the registers.
    """

    m_tiles: int
    warps: int
    ring: int
    min_blocks: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the number of rows."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    vocabulary: int
    conv_bias: bool
    batch: int
    device: int

    @property
    def outputs(self) -> int:
        """Of x_proj."""
        return self.dt_rank + 2 * self.d_state

    @property
    def slice(self) -> int:
        """Channels that a block convolves."""
        wanted = 256 if self.d_inner >= 4096 else 128
        return next(size for size in (wanted, 128, 64, 32) if self.d_inner % size == 0)

    @staticmethod
    def of(weights: StepWeights, batch: int) -> Shape:
        """Return the sizes of a model."""
        layer = weights.layers[0]
        d_inner, d_state = layer.A_log.shape
        return Shape(
            weights.embedding.shape[1], d_inner, d_state, layer.dt_proj.shape[1], weights.head.shape[0],
            layer.conv_bias is not None, batch, weights.embedding.device.index or 0,
        )  # fmt: skip


def obstacle(weights: StepWeights, batch: int) -> str | None:
    """Return why these kernels cannot step ``batch`` rows of this model, or None if they can."""
    tensors = [weights.embedding, weights.norm_f, weights.head]
    tensors += [t for layer in weights.layers for t in layer if t is not None]
    if any(not tensor.is_cuda for tensor in tensors):
        return "they take CUDA tensors"
    return _misfit(weights, batch) or nvrtc.unavailable() or _too_old(weights.embedding.device.index)


def _misfit(weights: StepWeights, batch: int) -> str | None:
    """Return what of the shapes, dtypes and layouts is in the way."""
    for layer in weights.layers:
        wide = (layer.dt_bias, layer.A_log, layer.D)
        narrow = [tensor for tensor in layer if tensor is not None and all(tensor is not w for w in wide)]
        narrow += [weights.embedding, weights.norm_f, weights.head]
        if any(t.dtype != torch.bfloat16 for t in narrow) or any(t.dtype != torch.float32 for t in wide):
            return "they take bfloat16 weights with float32 A_log, D and dt_proj.bias"
        if any(not tensor.is_contiguous() or tensor.data_ptr() % 16 for tensor in (*narrow, *wide)):
            return "they take contiguous weights at multiples of 16 bytes"
    shape = Shape.of(weights, batch)
    if weights.layers[0].conv_weight.shape[1] != _D_CONV:
        return f"they take {_D_CONV} taps, got {weights.layers[0].conv_weight.shape[1]}"
    if shape.d_state not in _D_STATES:
        return f"they take {', '.join(map(str, _D_STATES))} states, got {shape.d_state}"
    if shape.d_model % 32 or shape.d_inner % 32 or shape.dt_rank % 8:
        return "they take widths that are multiples of 32, and a dt_rank of 8"
    if shape.outputs > _MOST_OUTPUTS:
        return f"they take at most {_MOST_OUTPUTS} outputs of x_proj, got {shape.outputs}"
    if not 1 <= batch <= MOST_ROWS:
        return f"they take 1 to {MOST_ROWS} rows, got {batch}"
    return None


@functools.cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"they need compute capability 8.0, got {capability[0]}.{capability[1]}"


def tiling(kind: str, outputs: int, batch: int) -> Tiling:
    """Return how to cut a product for ``batch`` rows; ``kind`` is ``in``, ``out`` or ``head``."""
    if kind == "out":  # few outputs: blocks of 16, or too few blocks
        if batch <= 32:
            return Tiling(1, 16, 8 if batch <= 8 else 4, 1)
        return Tiling(1, 8, 2, 1)
    if batch <= 8:
        return Tiling(2, 8, 4, 2) if outputs >= 8192 else Tiling(1, 8, 8, 2)
    return Tiling(2, 8, 3, 2) if batch <= 16 else Tiling(4, 8, 2, 1) if batch <= 32 else Tiling(2, 8, 2, 1)


@functools.cache
def _program(device: int, **values: Any) -> Program:
    return Program(nvrtc.source(_SOURCE), nvrtc.macros(**values), device)


def _launch(
    shape: Shape, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int = 0, *, min_blocks: int = 1,
    eps: float = 0.0, overlaps: bool = True, **values: int,
) -> Launch:  # fmt: skip
    program = _program(shape.device, **{kernel.upper(): 1}, THREADS=threads, MIN_BLOCKS=min_blocks, **values)
    numbers = {"batch": shape.batch, "eps": eps}
    return Launch.of(program, kernel, grid, threads, _Args, numbers, shared_bytes, overlaps=overlaps)


def _parts(shape: Shape) -> tuple[int, int]:
    """Return how many elements of the residual stream a block writes, and how many such parts there are."""
    tile = 16 * tiling("out", shape.d_model, shape.batch).m_tiles
    return tile, -(-shape.d_model // tile)


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of each product."""
    return {
        "in": (2 * shape.d_inner, shape.d_model), "out": (shape.d_model, shape.d_inner),
        "head": (shape.vocabulary, shape.d_model),
    }  # fmt: skip


def _weight_bytes(shape: Shape) -> dict[str, int]:
    return {name: 2 * outputs * inputs for name, (outputs, inputs) in _sizes(shape).items()}


def prefetched(kind: str, shape: Shape, blocks: int) -> tuple[int, int]:
    """Return the bytes of the next weight that are a block's share, and how many of them it asks for."""
    weights = _weight_bytes(shape)
    share = (weights["out"] if kind == "in" else min(weights["in"], weights["head"])) // blocks
    # A small model's in_proj is read before it would be of use.
    useless = shape.batch > AHEAD_ROWS or (kind == "out" and weights["in"] <= AHEAD["out"])
    return share // 16 * 16, 0 if useless else min(share, AHEAD[kind] // blocks) // 16 * 16


def asked(kernel: str, shape: Shape, blocks: int) -> dict[str, int]:
    """Return how many blocks of ``convolve`` or ``update`` ask L2 for the next weight, and each one's bytes."""
    weights = _weight_bytes(shape)
    most = weights["out"] if kernel == "convolve" else min(weights["in"], weights["head"])
    if not AHEAD_ROWS < shape.batch <= ASKING_ROWS or weights["in"] < LEAST_ASKED:
        return {"ASKERS": 1, "SHARE": 0}  # one program for all of them
    askers = min(_ASKERS, blocks)
    return {"ASKERS": askers, "SHARE": min(most, ASKED[kernel]) // askers // 16 * 16}


@functools.lru_cache(maxsize=256)
def product_launch(kind: str, shape: Shape, eps: float, cut: Tiling | None = None) -> Launch:
    """Return the launch of a product of few rows."""
    outputs, inputs = _sizes(shape)[kind]
    cut = cut or tiling(kind, outputs, shape.batch)
    tile, n_tiles = 16 * cut.m_tiles, -(-shape.batch // 8)
    blocks, pieces = -(-outputs // tile), -(-(inputs // 32) // cut.warps)
    share, ahead = prefetched(kind, shape, blocks)
    return _launch(
        shape, "product", (blocks, 1, 1), 32 * cut.warps, 4 * cut.warps * 8 * n_tiles * (tile + 4),
        min_blocks=cut.min_blocks, eps=eps, OUTPUTS=outputs, K=inputs, KIND=_KINDS[kind], M_TILES=cut.m_tiles,
        N_TILES=n_tiles, RING=min(cut.ring, pieces), TILE=tile, PARTS=_parts(shape)[1], SHARE=share, AHEAD=ahead,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _embed_launch(shape: Shape) -> Launch:
    tile, parts = _parts(shape)
    sizes = {"OUTPUTS": shape.d_model, "TILE": tile, "PARTS": parts}
    return _launch(shape, "embed", (shape.batch, 1, 1), 256, overlaps=False, **sizes)


@functools.lru_cache(maxsize=256)
def _convolve_launch(shape: Shape, projects: bool) -> Launch:
    threads = max(32 * -(-shape.outputs // 16), shape.slice // 2) if projects else 256
    grid = (shape.d_inner // shape.slice, -(-shape.batch // _CONV_ROWS), 1)
    return _launch(
        shape, "convolve", grid, threads, overlaps=projects, D_INNER=shape.d_inner, SLICE=shape.slice,
        BLOCK_ROWS=_CONV_ROWS, HAS_BIAS=shape.conv_bias, PROJECTS=projects, OUTPUTS=shape.outputs,
        **asked("convolve", shape, grid[0] * grid[1]),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _delta_launch(shape: Shape) -> Launch:
    threads = min(512, 2 * shape.d_inner)
    return _launch(
        shape, "delta", (-(-2 * shape.d_inner // threads), -(-shape.batch // _CONV_ROWS), 1), threads,
        D_INNER=shape.d_inner, DT_RANK=shape.dt_rank, OUTPUTS=shape.outputs, BLOCK_ROWS=_CONV_ROWS,
        SLICES=shape.d_inner // shape.slice,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _norm_launch(shape: Shape, eps: float, adds: bool) -> Launch:
    threads = min(_NORM_THREADS, 32 * -(-shape.d_model // 128))
    return _launch(shape, "add_norm", (shape.batch, 1, 1), threads, eps=eps, OUTPUTS=shape.d_model, ADDS=adds)


@functools.lru_cache(maxsize=256)
def _update_launch(shape: Shape, projects: bool, overlaps: bool) -> Launch:
    channels = 64 if not projects else 32 if shape.batch < 8 else 128
    while shape.d_inner % channels or channels * shape.d_state // 4 > 512:
        channels //= 2
    threads, columns = channels * shape.d_state // 4, shape.d_inner // channels
    rows = 1 if shape.batch == 1 else 2
    while projects and rows < 8 and columns * -(-shape.batch // rows) * threads > _THREADS_AT_ONCE:
        rows *= 2
    grid = (columns, -(-shape.batch // rows), 1)
    return _launch(
        shape, "update", grid, threads, overlaps=overlaps, D_INNER=shape.d_inner, D_STATE=shape.d_state,
        DT_RANK=shape.dt_rank, OUTPUTS=shape.outputs, BLOCK_ROWS=rows,
        SLICES=shape.d_inner // shape.slice if projects else 0, **asked("update", shape, grid[0] * grid[1]),
    )  # fmt: skip


def run(weights: StepWeights, tokens: Tensor, conv_state: Tensor, ssm_state: Tensor, counts: Tensor) -> Tensor:
    """Run the kernels behind `decode_step`."""
    shape = Shape.of(weights, len(tokens))
    with nvrtc.on_device(tokens.device):
        if shape.batch <= FEW_ROWS:
            return few(weights, shape, tokens, conv_state, ssm_state, counts)
        counts.add_(1)
        return many(weights, shape, tokens, conv_state, ssm_state)


def few(
    weights: StepWeights, shape: Shape, tokens: Tensor, conv_state: Tensor, ssm_state: Tensor, counts: Tensor
) -> Tensor:
    """Step few rows on own kernels alone."""
    batch, eps = shape.batch, weights.eps

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device=tokens.device)

    residual, squares = (
        empty(batch, shape.d_model, dtype=torch.float32),
        empty(batch, _parts(shape)[1], dtype=torch.float32),
    )
    normed, xz = empty(batch, shape.d_model), empty(batch, 2 * shape.d_inner)
    mixed, y = empty(batch, shape.d_inner), empty(batch, shape.d_inner)
    part = empty(shape.d_inner // shape.slice, batch, shape.outputs, dtype=torch.float32)
    logits = empty(batch, shape.vocabulary, dtype=torch.float32)
    launches = {kind: product_launch(kind, shape, eps) for kind in _KINDS}
    stream = {"residual": residual, "normed": normed, "squares": squares}
    norms = [layer.norm for layer in weights.layers] + [weights.norm_f]
    products = _products(weights)
    _embed_launch(shape)(tokens=tokens, counts=counts, embedding=weights.embedding, norm=norms[0], **stream)
    for index, layer in enumerate(weights.layers):
        launches["in"](weight=layer.in_proj, x=normed, squares=squares, y=xz, next=layer.out_proj)
        _convolve_launch(shape, True)(
            weight=layer.x_proj, taps=layer.conv_weight, taps_bias=layer.conv_bias, xz=xz,
            conv_state=conv_state[index], mixed=mixed, part=part, next=layer.out_proj,
        )  # fmt: skip
        _update_launch(shape, True, True)(
            part=part, dt_weight=layer.dt_proj, **_scan(layer, ssm_state[index]), mixed=mixed, xz=xz, y=y,
            next=products[index + 1],
        )  # fmt: skip
        launches["out"](weight=layer.out_proj, x=y, norm=norms[index + 1], next=products[index + 1], **stream)
    launches["head"](weight=weights.head, x=normed, squares=squares, y=logits)
    return logits


def many(weights: StepWeights, shape: Shape, tokens: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    """Step many rows: torch's products, and own kernels for the states; up to `FUSED_ROWS` for all but the large ones.

    After a product of torch, which signals nothing before its end, what overlaps is a launch and the reading of
    weights and states.
    """
    residual = F.embedding(tokens, weights.embedding).float()
    added: Tensor | None = None
    own = shape.batch <= FUSED_ROWS
    products = _products(weights)
    for index, layer in enumerate(weights.layers):
        normed, residual = _normed(weights, shape, residual, added, layer.norm)
        xz = F.linear(normed, layer.in_proj)
        mixed = xz.new_empty(shape.batch, shape.d_inner)
        conv = {"taps": layer.conv_weight, "taps_bias": layer.conv_bias, "xz": xz, "conv_state": conv_state[index],
                "next": layer.out_proj}  # fmt: skip
        if own:
            part = xz.new_empty(shape.d_inner // shape.slice, shape.batch, shape.outputs, dtype=torch.float32)
            projected, delta = xz.new_empty(shape.batch, shape.outputs), torch.empty_like(mixed)
            _convolve_launch(shape, True)(weight=layer.x_proj, **conv, mixed=mixed, part=part)
            _delta_launch(shape)(part=part, dt_weight=layer.dt_proj, projected=projected, delta=delta)
        else:
            _convolve_launch(shape, False)(**conv, mixed=mixed)
            projected = F.linear(mixed, layer.x_proj)
            delta = F.linear(projected[:, : shape.dt_rank], layer.dt_proj)
        y = torch.empty_like(mixed)
        _update_launch(shape, False, own)(
            projected=projected, delta=delta, **_scan(layer, ssm_state[index]), mixed=mixed, xz=xz, y=y,
            next=products[index + 1],
        )  # fmt: skip
        added = F.linear(y, layer.out_proj)
    assert added is not None
    normed, _ = _normed(weights, shape, residual, added, weights.norm_f)
    return float32_product(normed, weights.head.t())


def _normed(
    weights: StepWeights, shape: Shape, residual: Tensor, added: Tensor | None, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the norm of the residual stream with ``added``, and that stream."""
    if shape.batch <= FUSED_ROWS:
        normed = residual.new_empty(residual.shape, dtype=torch.bfloat16)
        _norm_launch(shape, weights.eps, added is not None)(x=added, residual=residual, normed=normed, norm=norm)
        return normed, residual
    if added is None:
        return rms_norm(residual, norm, weights.eps), residual
    return add_rms_norm(residual, added, norm, weights.eps)


def _products(weights: StepWeights) -> list[Tensor]:
    """Return what each layer's input is multiplied by, and what the last layer's output is."""
    return [layer.in_proj for layer in weights.layers] + [weights.head]


def _scan(layer: LayerWeights, ssm_state: Tensor) -> dict[str, Tensor]:
    return {"delta_bias": layer.dt_bias, "A_log": layer.A_log, "D": layer.D, "ssm_state": ssm_state}
