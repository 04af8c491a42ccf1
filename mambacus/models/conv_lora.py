"""LoRA on the causal convolution, in PEFT's frame: its own layer for grouped convolutions needs a rank per channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call


class CausalConvLora(nn.Module, LoraLayer):
    """The taps of all channels as one matrix (d_inner, d_conv), changed by ``scaling B A``.

    A is (rank, d_conv), B (d_inner, rank) and, unless ``init_lora_weights`` is false, zero at first. A rank above
    d_conv adds nothing and is taken as d_conv, with the scaling of the rank that was asked for. There is no dropout:
    the taps are no input.

    Args:
        base_layer: a `mambacus.models.mamba.CausalConv1d`.
        adapter_name: PEFT's name of the first adapter.
        config: its ``LoraConfig``.
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        rest: what else PEFT hands to its layers.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: float, **rest: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **rest: Any) -> None:
        """Add an adapter (PEFT's word and signature).

        Raises:
            ValueError: a start other than true, false and ``gaussian``, the only ones that PEFT's frame has for it.
        """
        start = config.init_lora_weights
        if not isinstance(start, bool) and str(start).lower() != "gaussian":
            raise ValueError(f"init_lora_weights on a convolution: expected true, false or gaussian, got {start!r}")
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight  # (d_inner, 1, d_conv)
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        r = min(r, weight.shape[-1])
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.lora_dropout[adapter_name] = nn.Identity()
        down, up = nn.Linear(weight.shape[-1], r, bias=False), nn.Linear(r, weight.shape[0], bias=False)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = down, up
        self.lora_bias[adapter_name] = False
        self.reset_lora_parameters(adapter_name, start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what ``adapter`` adds to the taps, (d_inner, 1, d_conv)."""
        up: Any = self.lora_B[adapter].weight  # (d_inner, rank)
        down: Any = self.lora_A[adapter].weight  # (rank, d_conv)
        change: Tensor = up @ down * self.scaling[adapter]
        return change[:, None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Filter as `CausalConv1d` does, with the changed taps."""
        base: Any = self.base_layer
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return base(x, *args, **kwargs)
        weight = base.weight
        for name in active:
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
        return functional_call(base, {"weight": weight}, (x, *args), kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the taps (PEFT's word and signature).

        Raises:
            ValueError: with ``safe_merge``, the result is not finite.
        """
        for name in adapter_names or self.active_adapters:
            if name in self.lora_A and name not in self.merged_adapters:
                base: Any = self.get_base_layer()
                weight = base.weight + self.get_delta_weight(name).to(base.weight.dtype)
                if safe_merge and not weight.isfinite().all():
                    raise ValueError(f"the merged taps are not finite; the adapter {name} seems to be broken")
                base.weight.copy_(weight)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the change out again."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            base.weight.sub_(self.get_delta_weight(self.merged_adapters.pop()))
