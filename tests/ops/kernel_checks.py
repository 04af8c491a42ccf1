"""Hold a kernel to the reference in float64: outputs, final state and every gradient, in memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mambacus.ops.causal_conv1d.reference import causal_conv1d_ref
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
