"""What a recorded step depends on besides the numbers in the parameters, looked at before every replay."""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from mambacus.models import MambaLM
from mambacus.models.mamba import CausalConv1d, MambaMixer

_forward, _version, _backend = attrgetter("forward"), attrgetter("_version"), itemgetter("backend")


class Watch:
    """A model as it is now, to be compared with what it is later.

    Kernels read parameters by address, so new numbers in the same memory are no change, but in ``A_log``, of which the
    model keeps what it computes. The dictionaries of all modules are listed once and read afresh each time, in loops
    that run in C.

    Args:
        base: the model.

    Attributes:
        plain: a step is nothing but the model's own: no adapter, and no one else's module, hook or ``forward`` in it;
            and it can be watched.
    """

    def __init__(self, base: MambaLM) -> None:
        modules = list(base.modules())
        mixers = [module for module in modules if isinstance(module, MambaMixer)]
        self._base, self._modules = base, modules
        self._classes = list({type(module) for module in modules})
        self._attributes = [vars(module) for module in modules]
        self._registers: list[dict[str, Any]] = [r for m in modules for r in (m._modules, m._parameters) if r]
        self._hooks: list[Any] = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self._hooks += [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._backends = [vars(module) for module in modules if isinstance(module, (CausalConv1d, MambaMixer))]
        self._parameters = list(base.parameters())
        self._counted = [mixer.A_log for mixer in mixers if not mixer.A_log.is_inference()]
        self._registered = self._read()  # held, so that nothing new is taken for something old
        self._facts = self._look()
        # Parameters made in inference mode do not tell when they change; on a GPU a step reads them afresh.
        countable = all(m.A_log.device.type != "cpu" or not m.A_log.is_inference() for m in mixers)
        own = base.adapter is None and all(map(_is_ours, self._classes)) and not self._has_foreign_code()
        self.plain = own and countable

    def unchanged(self) -> bool:
        """Tell whether all is as it was."""
        now, before = self._read(), self._registered
        return len(now) == len(before) and all(map(is_, now, before)) and bool(self._facts == self._look())

    def _read(self) -> list[Any]:
        """Return the children and parameters of all modules, as they are registered now."""
        return list(chain.from_iterable(map(dict.values, self._registers)))

    def _look(self) -> Any:
        return (
            self._base.adapter,
            self._base.quantisation,
            torch.is_autocast_enabled("cpu"),
            self._has_foreign_code(),
            list(map(type, self._modules)),
            list(map(_forward, self._classes)),
            list(map(_backend, self._backends)),
            list(map(_version, self._counted)),
            list(map(Tensor.data_ptr, self._parameters)),
        )

    def _has_foreign_code(self) -> bool:
        return any(self._hooks) or any(map(dict.__contains__, self._attributes, repeat("forward")))


def _is_ours(cls: type[nn.Module]) -> bool:
    return cls is nn.ModuleList or cls.__module__.partition(".")[0] == "mambacus"
