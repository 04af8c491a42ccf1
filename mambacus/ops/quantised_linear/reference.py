"""The product with quantised weights in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambacus.ops.quantised_linear.packing import Packed, unpack


def quantised_linear_ref(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ unpack(weight).T + bias`` in the dtype of ``x``, computed in float32."""
    return F.linear(x.float(), unpack(weight), None if bias is None else bias.float()).to(x.dtype)
