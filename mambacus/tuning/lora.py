"""LoRA's linear layer for training, with two passes over the output less than PEFT's own."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from mambacus.ops import Linear
from mambacus.ops.dispatch import runs_eagerly_on_gpu
from mambacus.ops.linear.gpu import HALVES, lora_linear


class TrainedLoraLinear(PeftLinear):
    """PEFT's LoRA layer whose training pass adds the update into the base layer's output while multiplying.

    ``y = W x + (s B) (A dropout(x))``, where PEFT computes ``W x + s (B (A dropout(x)))``: scaling the small matrix B
    and accumulating in the product saves writing and reading two tensors of the size of the output, forward and
    backward. On a GPU under autocast one function does all of it: `mambacus.ops.linear.gpu.lora_linear`.
    Outside plain training (evaluation, merged, several adapters, DoRA and the like) it is PEFT's layer unchanged.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        active = self._plain_adapter()
        if active is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        rows = x.reshape(-1, x.shape[-1])
        if self._runs_on_gpu(rows):
            parts: tuple[Any, ...] = (self.base_layer, self.lora_A[active], self.lora_B[active])
            base, down, up = parts
            dropout = self.lora_dropout[active]
            product = lora_linear(
                rows, base.weight, down.weight, up.weight, self.scaling[active],
                dropout.p if isinstance(dropout, nn.Dropout) else 0.0, torch.get_autocast_dtype("cuda"),
            )  # fmt: skip
            return product.view(*x.shape[:-1], -1)
        output = self.base_layer(rows)
        low = self.lora_A[active](self.lora_dropout[active](rows))  # (rows, rank)
        up = self.lora_B[active].weight * self.scaling[active]  # (out_features, rank)
        output = output.addmm_(low.to(output.dtype), up.to(output.dtype).t())  # its producer does not need it again
        return output.view(*x.shape[:-1], -1)

    def _runs_on_gpu(self, rows: Tensor) -> bool:
        """Tell whether the base is a frozen matrix on a GPU, multiplied under autocast to half precision."""
        base: Any = self.base_layer
        if type(base) is not Linear or base.bias is not None or base.weight.requires_grad:
            return False
        if not (runs_eagerly_on_gpu(rows) and torch.is_autocast_enabled("cuda") and torch.is_grad_enabled()):
            return False
        return torch.get_autocast_dtype("cuda") in HALVES

    def _plain_adapter(self) -> str | None:
        """Return the name of the one adapter in training, None if there is more to do than the formula says."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not self.training or self.merged or self.disable_adapters or len(active) != 1:
            return None
        name: str = active[0]
        return None if name in self.lora_variant or self.lora_B[name].bias is not None else name
