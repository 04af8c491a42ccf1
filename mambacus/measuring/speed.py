"""How fast this device is, in about a second: what an estimate of a study's time is made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from mambacus.measuring.timing import median, time_ms

_ROWS = {"cpu": 512, "cuda": 4096}
WIDEST = {"cpu": 1024, "cuda": 4096}  # wider products are no faster
_COPIED = {"cpu": 2**25, "cuda": 2**29}  # bytes


def measure_speed(device: torch.device, widths: Collection[int], dtypes: Iterable[str]) -> dict[str, float]:
    """Measure matrix products as wide as the models, a copy, and the time to start an operation.

    Args:
        device: where the study would run.
        widths: the models' widths.
        dtypes: names of the dtypes of the products.

    Returns:
        ``gemm_<dtype>_<width>`` (operations a second of a product of many rows with a ``width`` x ``4 width`` matrix;
        for widths above `WIDEST` that of `WIDEST`), ``copy`` (bytes read plus written a second), ``call_seconds``
        (one small operation, started and finished in turn).
    """
    figures = {"copy": _copy(device), "call_seconds": _call(device)}
    widest = WIDEST[device.type]
    for name in sorted(set(dtypes)):
        measured = {width: _gemm(device, getattr(torch, name), width) for width in {min(w, widest) for w in widths}}
        figures |= {f"gemm_{name}_{width}": measured[min(width, widest)] for width in widths}
    return figures


def _gemm(device: torch.device, dtype: torch.dtype, width: int) -> float:
    rows = _ROWS[device.type]
    left = torch.randn(rows, width, device=device).to(dtype)
    right = torch.randn(width, 4 * width, device=device).to(dtype)
    milliseconds = median(time_ms(lambda: left @ right, device, repeats=3, warmup=1))
    return 2e3 * rows * width * 4 * width / milliseconds


def _copy(device: torch.device) -> float:
    source = torch.zeros(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2e3 * _COPIED[device.type] / median(time_ms(lambda: target.copy_(source), device, repeats=3, warmup=1))


def _call(device: torch.device) -> float:
    row, weight = torch.zeros(1, 64, device=device), torch.zeros(64, 64, device=device)
    calls = 200

    def chain() -> None:
        found = row
        for _ in range(calls):
            found = torch.nn.functional.linear(found, weight)

    return 1e-3 * median(time_ms(chain, device, repeats=3, warmup=1)) / calls
