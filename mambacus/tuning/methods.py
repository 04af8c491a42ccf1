"""What can be trained: one table of methods, from LoRA over those made for state spaces to the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from mambacus.models import MambaLM
from mambacus.models.mamba import MambaMixer
from mambacus.models.ssm_adapters import SSM_METHODS, attach, checked_options
from mambacus.runtime.errors import UserError, suggest
from mambacus.tuning.peft_methods import PEFT_METHODS, attach_peft, configuration

Rates = tuple[tuple[float, float], ...]
_ANY = float("inf")
_LORA_RATES: Rates = ((250e6, 1e-3), (1e9, 5e-4), (_ANY, 3e-4))
# ten times LoRA's, as the paper has it: Kopiczko et al. 2024, arXiv 2310.11454, table 9
_PEFT_RATES: dict[str, Rates] = {"vera": ((250e6, 1e-2), (1e9, 5e-3), (_ANY, 3e-3))}
_LORA_FAMILY = ("lora", "lora+", "rslora", "dora", "pissa", "olora", "cs5242")
LORA_PLUS_RATIO = 16.0


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Size and place of an adapter; None and empty leave the method's default.

    Attributes:
        rank: inner dimension r of ``B A``.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability that an input of the adapter is dropped.
        targets: modules that get one, as `mambacus.tuning.targets.resolve_targets` takes them.
        options: further keys: PEFT's configuration keys, or the options of a method of `SSM_METHODS`.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: of ``--method``.
        kind: whose code attaches it: PEFT's, ours for state spaces, or nobody's (the whole model trains).
        rates: (parameters of the model below which it holds, learning rate), ascending.
        quiet_parts: parts of the names of tensors whose gradient is zero at the first step by construction.
        targets: default places of an adapter of PEFT.
        preset: settings of ``finetune`` that this method changes unless they are given.
        packs: samples may share a row.
        peft: the method of PEFT behind it.
    """

    name: str
    kind: Literal["peft", "ssm", "full"]
    rates: Rates = _LORA_RATES
    quiet_parts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("in_proj", "out_proj")
    preset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    packs: bool = True
    peft: str = ""

    @property
    def saves(self) -> Literal["adapter", "model"]:
        """What a run leaves behind, an adapter or a whole model."""
        return "model" if self.kind == "full" else "adapter"

    def quiet_first(self, name: str) -> bool:
        """Tell whether the tensor called ``name`` starts with a zero gradient."""
        return any(part in name for part in self.quiet_parts)

    def learning_rate(self, parameters: int) -> float:
        """Return the default peak rate for a model of that many parameters."""
        return next(rate for below, rate in self.rates if parameters < below)

    def rate_factor(self, name: str) -> float:
        """Return by how much the rate of the tensor called ``name`` is multiplied."""
        return LORA_PLUS_RATIO if self.name == "lora+" and ".lora_B." in name else 1.0

    def attach(self, model: MambaLM, settings: AdapterSettings) -> nn.Module:
        """Make a float32 model ready: return the module to train, with ``requires_grad`` set.

        Raises:
            UserError: a setting the method does not have, or a target that matches nothing.
        """
        if self.kind == "full":
            return model.requires_grad_(True)
        if self.kind == "ssm":
            attach(model, self.name, _ssm_options(self.name, settings))
            attached: nn.Module = model
        else:
            attached = attach_peft(
                model, PEFT_METHODS[self.peft or self.name], settings.targets or self.targets, self._keys(settings)
            )
        for module in attached.modules():
            if isinstance(module, MambaMixer):
                module.recomputes = not any(p.requires_grad for p in module.x_proj.parameters())
        return attached

    def check(self, settings: AdapterSettings) -> None:
        """Check what `attach` checks of ``settings`` without a model.

        Raises:
            UserError: a setting the method does not have.
        """
        if self.kind == "ssm":
            checked_options(self.name, _ssm_options(self.name, settings))
        elif self.kind == "peft":
            configuration(PEFT_METHODS[self.peft or self.name], self._keys(settings))

    def _keys(self, settings: AdapterSettings) -> dict[str, Any]:
        """Return PEFT's configuration keys for ``settings``."""
        values: dict[str, Any] = {}
        if self.name in _LORA_FAMILY:
            values = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05}
            values |= {"r": 64, "lora_alpha": 128.0} if self.name == "cs5242" else {}
        if settings.rank is not None:
            values["r"] = settings.rank
        if settings.alpha is not None:
            values["lora_alpha" if self.name in _LORA_FAMILY else "alpha"] = settings.alpha
        if settings.dropout is not None:
            values["lora_dropout" if self.name in _LORA_FAMILY else "module_dropout"] = settings.dropout
        return values | dict(settings.options)


def _ssm_options(name: str, settings: AdapterSettings) -> dict[str, Any]:
    """Return the options of a method of `SSM_METHODS` for ``settings``.

    Raises:
        UserError: targets were given: these methods have their places.
    """
    if settings.targets:
        raise UserError(f"--targets {','.join(settings.targets)}: {name} has its own places and takes none")
    given = {"rank": settings.rank, "alpha": settings.alpha, "dropout": settings.dropout}
    return {key: value for key, value in given.items() if value is not None} | dict(settings.options)


def _peft(name: str) -> Method:
    rates = _LORA_RATES if name in _LORA_FAMILY else _PEFT_RATES.get(name, ((_ANY, 1e-3),))
    return Method(name, "peft", rates, PEFT_METHODS[name].quiet_first)


_SSM_RATES: dict[str, Rates] = {
    "lora-x": ((_ANY, 1e-3),),
    "state-offset": ((_ANY, 1e-3),),
    "init-state": ((_ANY, 1e-3),),
    "affix": ((_ANY, 1e-4),),
    "additional-scan": ((_ANY, 5e-3),),
    "bitfit": ((_ANY, 2e-3),),
}

METHODS: dict[str, Method] = {
    **{name: _peft(name) for name in PEFT_METHODS},
    **{
        name: Method(name, "ssm", _SSM_RATES.get(name, _LORA_RATES), method.quiet_first, packs=not method.beginning)
        for name, method in SSM_METHODS.items()
    },
    "cs5242": Method(
        "cs5242",
        "peft",
        ((_ANY, 2e-4),),
        PEFT_METHODS["lora"].quiet_first,
        targets=("x_proj", "embeddings", "in_proj", "out_proj"),
        preset={"batch_size": 1, "loss": "full"},
        peft="lora",
    ),
    "full": Method("full", "full", ((500e6, 1e-4), (_ANY, 3e-5))),
}


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        UserError: there is none, with a suggestion.
    """
    if name not in METHODS:
        raise UserError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}{suggest(name, METHODS)}")
    return METHODS[name]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return ``{"trainable": n, "total": n}``; a tied matrix counts once."""
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }
