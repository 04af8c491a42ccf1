"""Adapters made for state spaces: low rank on half a projection, state offsets, more states, learned beginnings.

`attach` changes a `MambaLM` in place: modules are wrapped, ``A_log`` gets a parametrization, a learned initial state is
handed to the backbone. Only what is learned requires a gradient afterwards. `fold` turns the adapted model back into a
plain one that computes the same, where that is possible.

An adapter folder has PEFT's two files; ``peft_type`` is `PEFT_TYPE`, a word that PEFT refuses by name, and ``method``
and ``options`` say what `attach` is to be called with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mambacus.models.mamba import Block, CausalConv1d, MambaLM, MambaMixer, StepProjection
from mambacus.models.state import MambaState
from mambacus.runtime.errors import UserError, suggest

PEFT_TYPE = "MAMBACUS_SSM"


class LowRank(nn.Module):
    """``y = W x``, with ``y[..., :rows] += scale B A dropout(x)``; A as PEFT draws it, B zero.

    Args:
        base_layer: the frozen projection.
        rows: outputs that are adapted, from the first.
        rank: inner dimension.
        scale: factor of the update.
        dropout: probability that an input of the update is dropped.
    """

    def __init__(self, base_layer: nn.Linear, rows: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        like: Any = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(rank, base_layer.in_features, **like))
        self.B = nn.Parameter(torch.zeros(rows, rank, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        y: Tensor = self.base_layer(x)
        low = F.linear(self.dropout(x), self.A.to(x.dtype))  # (..., rank)
        update = F.linear(low, (self.B * self.scale).to(low.dtype)).to(y.dtype)  # (..., rows)
        rest = y.shape[-1] - update.shape[-1]
        return y + (F.pad(update, (0, rest)) if rest else update)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return the projection with the update in its weight."""
        self.base_layer.weight[: len(self.B)] += (self.scale * self.B @ self.A).to(self.base_layer.weight.dtype)
        return self.base_layer


class SparseProjection(nn.Module):
    """``x_proj`` with a learned change of the entries that make B and C from chosen channels.

    Args:
        base_layer: the frozen projection, (dt_rank + 2 d_state, d_inner).
        first_row: ``dt_rank``, the first row of B.
        channels: int64 (k,), the chosen channels.
    """

    channels: Tensor

    def __init__(self, base_layer: nn.Linear, first_row: int, channels: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.first_row = first_row
        self.register_buffer("channels", channels)
        rows = base_layer.out_features - first_row
        self.delta = nn.Parameter(torch.zeros(rows, len(channels), device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_inner) to (..., dt_rank + 2 d_state)."""
        y: Tensor = self.base_layer(x)
        update = F.linear(x[..., self.channels], self.delta.to(x.dtype)).to(y.dtype)  # (..., 2 d_state)
        return y + F.pad(update, (self.first_row, 0))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return the projection with the change in its weight."""
        self.base_layer.weight[self.first_row :, self.channels] += self.delta.to(self.base_layer.weight.dtype)
        return self.base_layer


class SparseRates(nn.Module):
    """Parametrization of ``A_log``: a learned change of the rows of chosen channels.

    Args:
        channels: int64 (k,).
        d_state: numbers in a state.
    """

    channels: Tensor

    def __init__(self, channels: Tensor, d_state: int) -> None:
        super().__init__()
        self.register_buffer("channels", channels)
        self.delta = nn.Parameter(torch.zeros(len(channels), d_state, device=channels.device))

    def forward(self, A_log: Tensor) -> Tensor:
        """Return the changed ``A_log`` (d_inner, d_state)."""
        return A_log.index_add(0, self.channels, self.delta.to(A_log.dtype))


class MoreRates(nn.Module):
    """Parametrization of ``A_log``: ``extra`` learned columns behind the given ones, going on as S4D-Real does."""

    def __init__(self, A_log: Tensor, extra: int) -> None:
        super().__init__()
        d_inner, d_state = A_log.shape
        rates = torch.arange(d_state + 1, d_state + extra + 1, device=A_log.device, dtype=torch.float32).log()
        self.columns = nn.Parameter(rates.expand(d_inner, extra).clone())

    def forward(self, A_log: Tensor) -> Tensor:
        """Return ``A_log`` (d_inner, d_state + extra)."""
        return torch.cat([A_log, self.columns.to(A_log.dtype)], dim=1)


class MoreStates(nn.Module):
    """``x_proj`` with rows for the B and C of additional states; the new C is zero, so nothing changes at first.

    Args:
        base_layer: the frozen projection.
        split: ``(dt_rank, d_state, d_state)``.
        extra: additional states of each channel.
    """

    def __init__(self, base_layer: nn.Linear, split: tuple[int, int, int], extra: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.split = split
        bound = base_layer.in_features**-0.5
        like: Any = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.B = nn.Parameter(torch.empty(extra, base_layer.in_features, **like).uniform_(-bound, bound))
        self.C = nn.Parameter(torch.zeros(extra, base_layer.in_features, **like))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_inner) to (..., dt_rank + 2 (d_state + extra)), in the order dt, B, new B, C, new C."""
        dt, B, C = self.base_layer(x).split(self.split, dim=-1)
        more = F.linear(x, torch.cat([self.B, self.C]).to(x.dtype)).to(B.dtype).chunk(2, dim=-1)
        return torch.cat([dt, B, more[0], C, more[1]], dim=-1)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return the projection with the new rows in their places."""
        dt, B, C = self.base_layer.weight.split(self.split)
        weight = torch.cat([dt, B, self.B.to(dt.dtype), C, self.C.to(dt.dtype)])
        self.base_layer.weight = nn.Parameter(weight)
        self.base_layer.out_features = len(weight)
        return self.base_layer


class StateOffset(nn.Module):
    """What `MambaMixer` adds to the gated output of its scan: a constant offset of the state, or of what is read.

    ``h``: ``silu(z) (C . h')`` with h' (d_inner, d_state); ``y``: ``silu(z) y'`` with y' (d_inner,). Both start
    at zero.

    Source: Kang et al. 2025, State-offset Tuning, arXiv 2503.03499.
    """

    def __init__(self, mixer: MambaMixer, where: str) -> None:
        super().__init__()
        d_inner, d_state = mixer.A_log.shape
        self.where = where
        shape = (d_inner, d_state) if where == "h" else (d_inner,)
        self.offset = nn.Parameter(torch.zeros(shape, device=mixer.A_log.device))

    def forward(self, C: Tensor, z: Tensor) -> Tensor:
        """Return the addition (..., d_inner) for ``C`` (..., d_state) and ``z`` (..., d_inner)."""
        read = F.linear(C, self.offset.to(C.dtype)) if self.where == "h" else self.offset.to(z.dtype)
        return read * F.silu(z)


class Beginning(nn.Module):
    """Base of what gives the backbone a learned state where it starts a document from nothing.

    A row may then hold one document only: a second one in a row would start from zeros.
    """

    def before(self, model: MambaLM, batch: int) -> MambaState:
        """Return the state to begin with, of ``batch`` rows, with gradients."""
        raise NotImplementedError

    def hook(self, model: MambaLM) -> Callable[..., Any]:
        """Return a pre-hook for ``model.backbone``: a state that is not given is the learned one."""

        def begin(backbone: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            input_ids, seq_idx, state, *rest = args
            if state is None:
                _check_one_document(seq_idx)
                state = self.before(model, len(input_ids))
            return (input_ids, seq_idx, state, *rest)

        return begin


class InitialState(Beginning):
    """The state of every layer before the first token: h_0, and with ``conv`` also the convolution's inputs.

    Both start at zero, where the plain model starts.

    Source: initial state tuning as in Galim et al. 2025, arXiv 2410.09016.
    """

    def __init__(self, model: MambaLM, conv: bool) -> None:
        super().__init__()
        config, device = model.config, model.device
        self.ssm_state = nn.Parameter(torch.zeros(config.n_layer, config.d_inner, config.d_state, device=device))
        self.conv_state: nn.Parameter | None = None
        if conv:
            self.conv_state = nn.Parameter(torch.zeros(config.n_layer, config.d_inner, config.d_conv, device=device))

    def before(self, model: MambaLM, batch: int) -> MambaState:
        """Return the learned state."""
        empty = MambaState.zeros(model.config, batch, model.device, model.dtype)
        conv = empty.conv_state
        if self.conv_state is not None:
            conv = self.conv_state.to(conv.dtype)[:, None].expand_as(conv).contiguous()
        return MambaState(conv, self.ssm_state[:, None].expand_as(empty.ssm_state).contiguous(), empty.tokens)


class Affix(Beginning):
    """``tokens`` learned vectors that every mixer reads before the text; their outputs are left out.

    Because a mixer is causal, reading them first is the same as starting from the state they leave.

    Source: MambaPEFT, 2025, arXiv 2411.03855 (affix-tuning); here the affix stands in front.
    """

    def __init__(self, model: MambaLM, tokens: int) -> None:
        super().__init__()
        shape = (model.config.n_layer, tokens, model.config.d_model)
        self.vectors = nn.Parameter(torch.randn(shape, device=model.device) * 0.02)

    def before(self, model: MambaLM, batch: int) -> MambaState:
        """Return the state after the learned vectors."""
        empty = MambaState.zeros(model.config, batch, model.device, model.dtype)
        conv, ssm = [], []
        for block, vectors in zip(model.backbone.layers, self.vectors, strict=True):
            assert isinstance(block, Block)
            _, conv_state, ssm_state = block.mixer(vectors[None].to(model.dtype), None, None, None)
            conv.append(conv_state.expand(batch, -1, -1))
            ssm.append(ssm_state.expand(batch, -1, -1))
        return MambaState(torch.stack(conv), torch.stack(ssm), empty.tokens)


def _check_one_document(seq_idx: Tensor | None) -> None:
    if seq_idx is None:
        return
    real = seq_idx >= 0
    if bool(((seq_idx[:, 1:] != seq_idx[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
        raise ValueError("a learned initial state needs one document a row; this row packs several")


Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SsmMethod:
    """One kind of adapter of this file.

    Attributes:
        attach: changes a model in place; called with the options.
        options: names and defaults of the options.
        no_fold: why the adapter cannot be folded into a plain model; empty if it can.
        quiet_first: last parts of names of tensors whose gradient is zero at the first step by construction.
        beginning: it learns how a document begins: rows hold one document, and it can be written as a state file.
    """

    attach: Callable[[MambaLM, Options], None]
    options: Mapping[str, Any]
    no_fold: str = ""
    quiet_first: tuple[str, ...] = ()
    beginning: bool = False


def mixers(model: MambaLM) -> list[MambaMixer]:
    """Return the mixers of ``model``, first layer first."""
    return [module for module in model.modules() if isinstance(module, MambaMixer)]


def _attach_lora_x(model: MambaLM, options: Options) -> None:
    for mixer in mixers(model):
        rows = mixer.in_proj.out_features // 2  # x comes first, then z
        mixer.in_proj = LowRank(mixer.in_proj, rows, options["rank"], options["scale"], options["dropout"])  # type: ignore[assignment]


def _attach_sdt(model: MambaLM, options: Options) -> None:
    chosen = options["channels"]
    if len(chosen) != model.config.n_layer:
        raise UserError(f"sdt: expected the channels of {model.config.n_layer} layers, got {len(chosen)}")
    scale = options["alpha"] / options["rank"]
    for mixer, numbers in zip(mixers(model), chosen, strict=True):
        channels = torch.tensor(numbers, dtype=torch.int64, device=model.device)
        d_state = mixer.A_log.shape[1]
        parametrize.register_parametrization(mixer, "A_log", SparseRates(channels, d_state))
        mixer.x_proj = SparseProjection(mixer.x_proj, mixer.split[0], channels)  # type: ignore[assignment]
        for name in ("in_proj", "out_proj"):
            layer = getattr(mixer, name)
            setattr(mixer, name, LowRank(layer, layer.out_features, options["rank"], scale, options["dropout"]))


def _attach_additional_scan(model: MambaLM, options: Options) -> None:
    extra = options["states"]
    for mixer in mixers(model):
        dt_rank, d_state, _ = mixer.split
        mixer.x_proj = MoreStates(mixer.x_proj, mixer.split, extra)  # type: ignore[assignment]
        parametrize.register_parametrization(mixer, "A_log", MoreRates(mixer.A_log, extra), unsafe=True)
        mixer.split = (dt_rank, d_state + extra, d_state + extra)
    model.config = dataclasses.replace(model.config, d_state=model.config.d_state + extra)


def _attach_state_offset(model: MambaLM, options: Options) -> None:
    if options["where"] not in ("h", "y"):
        raise UserError(f"state-offset: option where: expected h or y, got {options['where']!r}")
    for mixer in mixers(model):
        mixer.offset = StateOffset(mixer, options["where"])


def _attach_beginning(model: MambaLM, beginning: Beginning) -> None:
    model.beginning = beginning
    model.backbone.register_forward_pre_hook(beginning.hook(model))


def _attach_init_state(model: MambaLM, options: Options) -> None:
    _attach_beginning(model, InitialState(model, options["conv"]))


def _attach_affix(model: MambaLM, options: Options) -> None:
    _attach_beginning(model, Affix(model, options["tokens"]))


def _attach_bitfit(model: MambaLM, options: Options) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, CausalConv1d, StepProjection)) and module.bias is not None:
            module.bias.requires_grad_(True)


_BEGINS = "it is a state before the first token, which no weight can hold; write it as a state file (--to state)"
SSM_METHODS: dict[str, SsmMethod] = {
    "lora-x": SsmMethod(_attach_lora_x, {"rank": 64, "scale": 0.1, "dropout": 0.0}, quiet_first=(".in_proj.A",)),
    "sdt": SsmMethod(
        _attach_sdt,
        {"rank": 16, "alpha": 32.0, "dropout": 0.05, "share": 0.01, "channels": ()},
        quiet_first=(".in_proj.A", ".out_proj.A"),
    ),
    "state-offset": SsmMethod(
        _attach_state_offset,
        {"where": "h"},
        no_fold="its offset does not depend on the input, and the scan of a plain model has no constant term",
    ),
    "init-state": SsmMethod(_attach_init_state, {"conv": False}, no_fold=_BEGINS, beginning=True),
    "affix": SsmMethod(_attach_affix, {"tokens": 16}, no_fold=_BEGINS, beginning=True),
    "additional-scan": SsmMethod(_attach_additional_scan, {"states": 4}, quiet_first=(".x_proj.B", ".A_log.0.columns")),
    "bitfit": SsmMethod(_attach_bitfit, {}),
}


def attach(model: MambaLM, name: str, options: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Put the adapter ``name`` on ``model``, in place; everything else is frozen.

    Args:
        model: a plain model.
        name: a key of `SSM_METHODS`.
        options: what shall differ from the method's defaults.

    Returns:
        The learned tensors by name.

    Raises:
        UserError: unknown method or option, or one of the wrong type.
    """
    if name not in SSM_METHODS:
        raise UserError(f"adapter: unknown method {name!r}{suggest(name, SSM_METHODS)}")
    method = SSM_METHODS[name]
    chosen = checked_options(name, options)
    before = set(map(id, model.parameters()))
    model.requires_grad_(False)
    method.attach(model, chosen)
    learned = {
        path: parameter
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and (name == "bitfit" or id(parameter) not in before)
    }
    model.requires_grad_(False)
    for parameter in learned.values():
        parameter.requires_grad_(True)
    model.adapter = AttachedMethod(name, chosen)
    return learned


@dataclasses.dataclass(frozen=True)
class AttachedMethod:
    """Which adapter a model carries."""

    name: str
    options: Options


def checked_options(name: str, options: Mapping[str, Any]) -> Options:
    """Return the method's defaults with ``options`` over them.

    Raises:
        UserError: an option the method does not have, or a value of another type; all are named.
    """
    defaults = SSM_METHODS[name].options
    faults = []
    for key, value in options.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            faults.append(f"{key}: {name} has the options {known}{suggest(key, defaults)}")
            continue
        kind = type(defaults[key])
        allowed: Any = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
        fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        if not fits:
            faults.append(f"{key}: expected {kind.__name__}, got {value!r}")
        elif (kind is float and value < 0) or (kind is int and value < 1):
            faults.append(f"{key}: expected a positive number, got {value!r}")
    if faults:
        raise UserError(f"options of {name}: {'; '.join(faults)}")
    return {**defaults, **options}


@torch.no_grad()
def fold(model: MambaLM) -> MambaLM:
    """Turn the adapted ``model`` into a plain one that computes the same, in place.

    Raises:
        UserError: the adapter cannot be folded; the message says why.
    """
    attached = model.adapter
    if attached is None:
        raise UserError("fold: the model carries no adapter")
    method = SSM_METHODS[attached.name]
    if method.no_fold:
        raise UserError(f"{attached.name} cannot be merged into a plain model: {method.no_fold}")
    for mixer in mixers(model):
        for name in ("in_proj", "x_proj", "out_proj"):
            layer = getattr(mixer, name)
            if hasattr(layer, "folded"):
                setattr(mixer, name, layer.folded())
        if parametrize.is_parametrized(mixer, "A_log"):
            rates = mixer.A_log.detach().clone()
            parametrize.remove_parametrizations(mixer, "A_log", leave_parametrized=False)
            mixer.A_log = nn.Parameter(rates)
    model.adapter = None
    return model.requires_grad_(True)


def starting_state(model: MambaLM) -> MambaState:
    """Return the learned state of one row that a document begins with.

    Raises:
        UserError: the model carries no adapter that learns one.
    """
    if model.beginning is None:
        raise UserError("no learned beginning: a state file can be made of an init-state or affix adapter")
    with torch.no_grad():
        return model.beginning.before(model, 1).detach()
