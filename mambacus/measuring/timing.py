"""Timing one callable: warm up, synchronise, repeat, report every sample; and what all sides of a benchmark share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambacus.measuring.cases import Case
from mambacus.runtime.graphs import CudaRecorder


def time_ms(step: Callable[[], object], device: torch.device, *, repeats: int, warmup: int) -> list[float]:
    """Return the wall-clock milliseconds of ``repeats`` calls of ``step`` after ``warmup`` uncounted ones.

    The GPU is synchronised before each clock reading, so queued work is counted where it was caused.
    """
    samples = []
    for index in range(warmup + repeats):
        _synchronise(device)
        start = time.perf_counter()
        step()
        _synchronise(device)
        if index >= warmup:
            samples.append(1e3 * (time.perf_counter() - start))
    return samples


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a step of fixed shapes as a CUDA graph: its kernels without the time to launch them."""
    recorder = CudaRecorder(torch.device("cuda"))
    for _ in range(2):
        recorder.warm_up(step)
    replay, _ = recorder.record(step)
    return replay


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(samples: list[float]) -> float:
    """Return the median of ``samples``."""
    return statistics.median(samples)


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure what this machine can do at most right now.

    Returns:
        ``copy_gb_s``: bytes read plus written by a large copy; ``float32_gemm_gflop_s`` and ``bfloat16_gemm_gflop_s``:
        a large matrix product through torch.
    """
    size = 2**26 if device.type == "cpu" else 2**29
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = median(time_ms(lambda: target.copy_(source), device, repeats=7, warmup=2))
    figures = {"copy_gb_s": 2 * size / copy_ms / 1e6}
    side = 512 if device.type == "cpu" else 8192  # bfloat16 without hardware for it: 0.5 s a product already
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        gemm_ms = median(time_ms(lambda a=left, b=right: a @ b, device, repeats=5, warmup=2))  # type: ignore[misc]
        figures[f"{str(dtype).removeprefix('torch.')}_gemm_gflop_s"] = 2 * side**3 / gemm_ms / 1e6
    return figures


def prompt_ids(case: Case, vocab_size: int, device: torch.device) -> Tensor:
    """Return a case's random tokens, int64 (batch, seqlen), the same for every implementation with that vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (case.batch, case.seqlen), generator=generator).to(device)


def train_step(model: nn.Module, loss: Callable[[], Tensor], case: Case) -> None:
    """Do a forward and backward pass into fresh gradients; under bfloat16 autocast if the case's dtype is ``mixed``."""
    model.zero_grad(set_to_none=True)
    device = torch.device(case.device).type
    with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "mixed", cache_enabled=not case.graph):
        value = loss()
    value.backward()


def model_bytes(model: nn.Module, embeddings: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's weights, and without the embeddings if the output head is not the same matrix."""
    parameters = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    total = sum(parameters.values())
    table = next(embeddings.parameters())
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and next(head.parameters()) is table
    return total, total if tied else total - table.nbytes
