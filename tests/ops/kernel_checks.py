"""Hold a kernel to the reference in float64: outputs, final state and every gradient, in memory that starts as NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref
from mambacus.ops.decode_step import LayerWeights, StepWeights
from mambacus.ops.decode_step.reference import decode_step_ref
from mambacus.ops.selective_scan.reference import selective_scan_ref

SCAN_NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CONV_NAMES = ("x", "weight", "bias", "initial_state")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # a few times the rounding of the outputs

Tensors = dict[str, Tensor | None]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def document_ids(batch: int, seqlen: int, device: str = "cpu") -> Tensor:
    """Documents of random length; row 0 unpadded, 1 padded left, 2 right, 3 both, 4 padding alone, and so on."""
    g = torch.Generator().manual_seed(seqlen)
    ids = (torch.rand(batch, seqlen, generator=g) < 0.1).int().cumsum(1)
    for row in range(batch):
        if row % 5 in (1, 3):
            ids[row, : seqlen // 4] = -1
        if row % 5 in (2, 3):
            ids[row, seqlen - seqlen // 3 :] = -1
        if row % 5 == 4:
            ids[row] = -1
    return ids.to(device)


def scan_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, absent: tuple[str, ...] = (),
    seq_idx: Tensor | None = None, device: str = "cpu",
) -> Tensors:  # fmt: skip
    """Random (batch, seqlen, d_inner, d_state) inputs. x and z, B and C are halves of one tensor: rows are strided, as
    in the model. What padding tokens hold is NaN: nobody may look at it.
    """
    batch, seqlen, d_inner, d_state = shape
    g = torch.Generator().manual_seed(seqlen * d_inner + d_state)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device)

    xz, bc = normal(batch, seqlen, 2 * d_inner).to(dtype), normal(batch, seqlen, 2 * d_state).to(dtype)
    delta = normal(batch, seqlen, d_inner).to(dtype)
    if seq_idx is not None:
        for tensor in (xz, bc, delta):
            tensor[seq_idx < 0] = float("nan")
    (x, z), (B, C) = xz.chunk(2, dim=-1), bc.chunk(2, dim=-1)
    inputs = {
        "x": x, "delta": delta, "A": -4 * torch.rand(d_inner, d_state, generator=g).to(device), "B": B, "C": C,
        "D": normal(d_inner), "z": z, "delta_bias": normal(d_inner) - 1,
        "initial_state": normal(batch, d_inner, d_state),
    }  # fmt: skip
    return inputs | dict.fromkeys(absent)


def hold_scan(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]], inputs: Tensors,
    *, seq_idx: Tensor | None = None, softplus: bool = True, with_final: bool = True, twice: bool = True,
) -> None:  # fmt: skip
    """Compare a pair of functions with the signatures of ``selective_scan/gpu.py`` with the reference; run them
    ``twice`` to see whether results repeat."""
    x, A = inputs["x"], inputs["A"]
    assert x is not None and A is not None
    leaves = _leaves(inputs)
    truth: dict[str, Tensor] = {}
    truth["y"], truth["final_state"] = selective_scan_ref(
        *(leaves[k] for k in SCAN_NAMES[:7]), delta_bias=leaves["delta_bias"], delta_softplus=softplus,
        seq_idx=seq_idx, initial_state=leaves["initial_state"],
    )  # fmt: skip
    grads = _output_gradients(truth, x.dtype, torch.float32, with_final)
    _add_gradients(truth, leaves, grads)
    given = (*(inputs[k] for k in SCAN_NAMES[:8]), softplus, seq_idx, inputs["initial_state"])

    def run() -> dict[str, Tensor]:
        y, final, chunks = forward(*given, True)
        return {"y": y, "final_state": final} | dict(
            zip(SCAN_NAMES, backward(grads[0], grads[1], *given, chunks), strict=True)
        )

    _compare(run, truth, inputs, twice)


def conv_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, absent: tuple[str, ...] = (),
    seq_idx: Tensor | None = None, device: str = "cpu",
) -> Tensors:  # fmt: skip
    """Random (batch, seqlen, d_inner, d_conv) inputs, with strided rows and NaN in padding."""
    batch, seqlen, d_inner, width = shape
    g = torch.Generator().manual_seed(seqlen * d_inner + width)
    x = torch.randn(batch, seqlen, 2 * d_inner, generator=g).to(device, dtype)[..., :d_inner]
    if seq_idx is not None:
        x[seq_idx < 0] = float("nan")
    inputs = {
        "x": x, "weight": torch.randn(d_inner, width, generator=g).to(device),
        "bias": torch.randn(d_inner, generator=g).to(device),
        "initial_state": torch.randn(batch, d_inner, width, generator=g).to(device, dtype),
    }  # fmt: skip
    return inputs | dict.fromkeys(absent)


def hold_conv(
    forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]], inputs: Tensors,
    *, seq_idx: Tensor | None = None, silu: bool = True, with_final: bool = True, twice: bool = True,
) -> None:  # fmt: skip
    """Compare a pair of functions with the signatures of ``causal_conv1d/gpu.py`` with the reference; run them
    ``twice`` to see whether results repeat."""
    x = inputs["x"]
    assert x is not None
    leaves = _leaves(inputs)
    truth: dict[str, Tensor] = {}
    truth["y"], truth["final_state"] = causal_conv1d_ref(
        *(leaves[k] for k in CONV_NAMES[:3]), activation="silu" if silu else None, seq_idx=seq_idx,
        initial_state=leaves["initial_state"],
    )  # fmt: skip
    grads = _output_gradients(truth, x.dtype, x.dtype, with_final)
    _add_gradients(truth, leaves, grads)
    given = (*(inputs[k] for k in CONV_NAMES[:3]), silu, seq_idx, inputs["initial_state"])

    def run() -> dict[str, Tensor]:
        y, final = forward(*given)
        return {"y": y, "final_state": final} | dict(zip(CONV_NAMES, backward(grads[0], grads[1], *given), strict=True))

    _compare(run, truth, inputs, twice)


def hold_norm(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, y_dtype: torch.dtype, *, with_added: bool,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Compare a pair of functions with the signatures of ``rms_norm/gpu.py`` with torch in float64."""
    g = torch.Generator().manual_seed(shape[-1])
    x, weight = torch.randn(shape, generator=g).to(device, dtype), torch.randn(shape[-1:], generator=g)
    weight, added = weight.to(device, weight_dtype), torch.randn(shape, generator=g).to(device, y_dtype)
    grads = [torch.randn(shape, generator=g).to(device, kind) for kind in (y_dtype, dtype)]
    leaves = [t.double().requires_grad_() for t in (x, added, weight)]
    total = leaves[0] + leaves[1] if with_added else leaves[0]
    y = torch.nn.functional.rms_norm(total, shape[-1:], leaves[2], 1e-5)
    outputs = ([y, total], [t.double() for t in grads]) if with_added else ([y], [grads[0].double()])
    want_x, want_added, want_weight = torch.autograd.grad(*outputs[:1], leaves, outputs[1], allow_unused=True)
    with poisoned_memory():
        got_y, got_total, scale = forward(x, added if with_added else None, weight, 1e-5, y_dtype)
        got_x, got_added, got_weight = backward(
            grads[0], grads[1] if with_added else None, got_total if with_added else x, weight, scale,
            y_dtype if with_added else None,
        )  # fmt: skip
    pairs = {"y": (got_y, y), "x": (got_x, want_x), "weight": (got_weight, want_weight)}
    if with_added:
        pairs["sum"] = (got_total, total)
        pairs["added"] = (got_x if y_dtype == dtype else got_added, want_added)
    lowest = min((dtype, weight_dtype, y_dtype), key=lambda kind: torch.finfo(kind).bits + torch.finfo(kind).eps)
    for name, (got, want) in pairs.items():
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < BOUND[lowest], (name, error)
    assert got_y.dtype == y_dtype and got_x.dtype == dtype and got_weight.dtype == weight_dtype


def hold_cross_entropy(
    function: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare a function with the signature of ``cross_entropy_`` with torch in float64."""
    g = torch.Generator().manual_seed(shape[1])
    logits = (4 * torch.randn(shape, generator=g)).to(device, dtype)
    targets = torch.randint(shape[1], shape[:1], generator=g).to(device)
    targets[1:2] = -100
    leaf = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    with poisoned_memory():
        losses = function(logits.clone(), targets, gradient=False)
        got = logits.clone()
        assert torch.equal(function(got, targets, gradient=True), losses)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=1e-6)
    assert (got.double() - gradient).norm() <= BOUND[dtype] * gradient.norm()
    assert got.dtype == dtype


def hold_linear_cross_entropy(function: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare ``linear_cross_entropy`` with torch in float64, also where only one gradient is wanted."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=g).to(device, dtype) for size in ((10, 24), (72, 24)))
    targets = torch.randint(72, (10,), generator=g).to(device)
    targets[3] = -100
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    want = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="sum")
    wanted = torch.autograd.grad(2 * want, wide)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
        loss = function(*leaves, targets)
        assert abs(loss.item() - want.item()) <= BOUND[dtype] * abs(want.item())
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        got = torch.autograd.grad(2 * loss, asked) if asked else ()
        for a, b in zip(got, [b for b, need in zip(wanted, needs, strict=True) if need], strict=True):
            assert a.dtype == dtype and (a.double() - b).norm() <= BOUND[dtype] * b.norm()


def _leaves(inputs: Tensors) -> Tensors:
    return {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}


def _output_gradients(
    truth: dict[str, Tensor], dtype: torch.dtype, state_dtype: torch.dtype, with_final: bool
) -> tuple[Tensor, Tensor | None]:
    y, final = truth["y"], truth["final_state"]
    g = torch.Generator().manual_seed(y.numel())
    grad_y = torch.randn(y.shape, generator=g).to(y.device, dtype)
    return grad_y, torch.randn(final.shape, generator=g).to(y.device, state_dtype) if with_final else None


def _add_gradients(truth: dict[str, Tensor], leaves: Tensors, grads: tuple[Tensor, Tensor | None]) -> None:
    kept = {k: v for k, v in leaves.items() if v is not None}
    outputs = [truth["y"]] if grads[1] is None else [truth["y"], truth["final_state"]]
    given = [g.double() for g in grads if g is not None]
    truth |= dict(zip(kept, torch.autograd.grad(outputs, list(kept.values()), given), strict=True))


def _compare(run: Callable[[], dict[str, Tensor]], truth: dict[str, Tensor], inputs: Tensors, twice: bool) -> None:
    with poisoned_memory():
        got = run()
    again = run() if twice else got
    bound = BOUND[got["y"].dtype]
    errors: dict[str, Any] = {}
    for name, want in truth.items():
        want = want.detach().nan_to_num()  # the reference's gradient at NaN padding
        assert got[name].shape == want.shape, name
        errors[name] = ((got[name].double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        assert torch.equal(got[name], again[name]), f"{name} differs from run to run"
    assert all(error < bound for error in errors.values()), errors  # false for NaN
    for name, given in inputs.items():
        if given is None:
            assert got[name].numel() == 0, name
        else:
            assert got[name].dtype == given.dtype, name


STEP_SHAPES: tuple[dict[str, Any], ...] = (
    {"d_model": 160, "dt_rank": 40, "vocabulary": 17},
    {"d_model": 352, "n_layer": 1},
    {"d_model": 32, "d_state": 8, "conv_bias": False},
    {"d_model": 32, "d_state": 64, "dt_rank": 16},
)  # arguments of `step_weights` that fit no tile


def step_weights(
    d_model: int = 64, d_state: int = 16, dt_rank: int = 8, vocabulary: int = 70, n_layer: int = 2, *,
    conv_bias: bool = True, device: str = "cpu",
) -> StepWeights:  # fmt: skip
    """Random bfloat16 weights of a model, of sizes that neither vanish nor explode over the layers."""
    g = torch.Generator().manual_seed(d_model + d_state + dt_rank)
    d_inner = 2 * d_model

    def matrix(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(device, dtype)

    def vector(size: int, mean: float, deviation: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (mean + deviation * torch.randn(size, generator=g)).to(device, dtype)

    layers = tuple(
        LayerWeights(
            norm=vector(d_model, 1, 0.1), in_proj=matrix(2 * d_inner, d_model), conv_weight=matrix(d_inner, 4),
            conv_bias=vector(d_inner, 0, 0.1) if conv_bias else None, x_proj=matrix(dt_rank + 2 * d_state, d_inner),
            dt_proj=matrix(d_inner, dt_rank), dt_bias=vector(d_inner, -1, 1, torch.float32),
            A_log=torch.log(4 * torch.rand(d_inner, d_state, generator=g) + 0.1).to(device),
            D=vector(d_inner, 1, 0.1, torch.float32), out_proj=matrix(d_model, d_inner),
        )
        for _ in range(n_layer)
    )  # fmt: skip
    embedding = vector(vocabulary * d_model, 0, 1).view(vocabulary, d_model)
    return StepWeights(embedding, layers, vector(d_model, 1, 0.1), matrix(vocabulary, d_model), 1e-5)


def in_float64(weights: StepWeights) -> StepWeights:
    """The same numbers in float64."""
    layers = tuple(LayerWeights(*(None if t is None else t.double() for t in layer)) for layer in weights.layers)
    embedding, norm_f, head = (t.double() for t in (weights.embedding, weights.norm_f, weights.head))
    return StepWeights(embedding, layers, norm_f, head, weights.eps)


def hold_step(function: Callable[..., Tensor], weights: StepWeights, batch: int, capacity: int | None = None) -> None:
    """Compare a function with the signature of ``decode_step`` with the reference in float64.

    Its errors may be at most 1.5 times those of the reference in bfloat16. The states are the first rows of memory for
    ``capacity`` rows, as a decoder's are, and no other row may change.
    """
    device, layers = weights.embedding.device, len(weights.layers)
    d_inner, d_state = weights.layers[0].A_log.shape
    capacity = capacity or batch + 1
    g = torch.Generator().manual_seed(batch)
    conv = torch.randn(layers, capacity, d_inner, 4, generator=g).to(device, torch.bfloat16)
    ssm = torch.randn(layers, capacity, d_inner, d_state, generator=g).to(device)
    tokens = torch.randint(weights.embedding.shape[0], (batch,), generator=g).to(device)
    want = decode_step_ref(in_float64(weights), tokens, conv[:, :batch].double(), ssm[:, :batch].double())
    plain = decode_step_ref(weights, tokens, conv[:, :batch], ssm[:, :batch])
    results = []
    for _ in range(2):
        new_conv, new_ssm, counts = conv.clone(), ssm.clone(), torch.arange(capacity, device=device)
        with poisoned_memory():
            logits = function(weights, tokens, new_conv[:, :batch], new_ssm[:, :batch], counts[:batch])
        results.append((logits, new_conv, new_ssm, counts))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert logits.dtype == torch.float32 and logits.shape == (batch, weights.head.shape[0])
    assert torch.equal(counts, torch.arange(capacity, device=device) + (torch.arange(capacity, device=device) < batch))
    assert torch.equal(new_conv[:, batch:], conv[:, batch:]) and torch.equal(new_ssm[:, batch:], ssm[:, batch:])
    got = (logits, new_conv[:, :batch], new_ssm[:, :batch])
    for name, ours, reference, exact in zip(("logits", "conv_state", "ssm_state"), got, plain, want, strict=True):
        error, bound = ((t.double() - exact).norm() / exact.norm() for t in (ours, reference))
        assert error <= 1.5 * bound, (name, error, bound)


def hold_likeliest(function: Callable[[Tensor], Tensor], columns: int, device: str = "cpu") -> None:
    """Compare with a walk through each row: ties, infinities and NaN at both ends of it and in between."""
    g = torch.Generator().manual_seed(columns)
    logits = torch.randn(9, columns, generator=g)
    logits[1] = logits[1].round()  # many equal ones
    logits[2], logits[3] = -torch.inf, 3.0
    logits[4, columns // 2 :] = torch.inf
    for row, column in ((5, 0), (6, columns - 1), (7, columns // 2)):
        logits[row, column] = torch.nan
    logits[7, 0] = torch.inf
    want = [-1 if any(map(math.isnan, row)) else row.index(max(row)) for row in logits.tolist()]
    with poisoned_memory():
        got = function(logits.to(device))
    assert got.dtype == torch.int64 and got.tolist() == want
    assert function(logits[:0].to(device)).tolist() == []
