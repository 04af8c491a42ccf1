"""Measure one `Case` and print one JSON line: ``python -m mambacus.measuring.worker '{"benchmark": ...}'``."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from mambacus.measuring.cases import Case
from mambacus.measuring.timing import captured, median, time_ms
from mambacus.models import load
from mambacus.runtime.device import peak_memory_bytes, resolve_device, resolve_dtype


def measure(case: Case) -> dict[str, Any]:
    """Build the model of ``case`` with random weights, time its step and return the figures."""
    if case.threads:
        torch.set_num_threads(case.threads)
    device = resolve_device(case.device)
    dtype = torch.float32 if case.dtype == "mixed" else resolve_dtype(case.dtype)
    torch.manual_seed(0)
    model, config = _build(case, device, dtype)
    input_ids = torch.randint(2, config["vocab_size"], (case.batch, case.seqlen), device=device)
    before = peak_memory_bytes(device)
    step = _step(case, model, input_ids)
    samples = time_ms(step, device, repeats=case.repeats, warmup=case.warmup)
    return {
        "samples_ms": [round(sample, 3) for sample in samples],
        "median_ms": round(median(samples), 3),
        "tokens_per_second": round(1e3 * case.tokens / median(samples), 2),
        "peak_memory_bytes": peak_memory_bytes(device),
        "weights_memory_bytes": before,
    }


def _build(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    if case.implementation == "mambacus":
        model, _ = load(f"random:{case.model}", device=device, dtype=dtype)
        return model.train(case.benchmark == "train"), {"vocab_size": model.config.vocab_size}
    import transformers

    transformers.logging.set_verbosity_error()
    shape, _ = load(f"random:{case.model}", device="meta", dtype=dtype)
    config = transformers.MambaConfig(**shape.config.to_hf("float32"))
    peer: torch.nn.Module = transformers.MambaForCausalLM(config)
    peer.to(device=device, dtype=dtype)
    return peer.train(case.benchmark == "train"), {"vocab_size": config.vocab_size}


def _step(case: Case, model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], object]:
    if case.benchmark == "train":
        options = {"loss_only": True} if case.implementation == "mambacus" and input_ids.is_cuda else {}
        step = functools.partial(_train_step, model, input_ids, case, options)
        return captured(step) if case.graph else step
    if case.benchmark == "prefill":
        return lambda: _prefill(model, input_ids)
    decode = _decode_mambacus if case.implementation == "mambacus" else _decode_transformers
    return decode(model, input_ids, case.new_tokens)


def _train_step(model: torch.nn.Module, input_ids: torch.Tensor, case: Case, options: dict[str, bool]) -> None:
    model.zero_grad(set_to_none=True)
    autocast = case.dtype == "mixed"
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=autocast, cache_enabled=not case.graph):
        loss = model(input_ids, labels=input_ids, **options).loss
    loss.backward()


@torch.inference_mode()
def _prefill(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids).logits


def _decode_mambacus(model: torch.nn.Module, input_ids: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    with torch.inference_mode():
        prompt = model(input_ids)

    @torch.inference_mode()
    def step() -> None:
        state, token = prompt.state.fork(1), prompt.logits[:, -1:].argmax(-1)  # a copy: the steps change it in place
        for _ in range(new_tokens):
            out = model(token, state=state, reuse_state=True)
            state, token = out.state, out.logits[:, -1:].argmax(-1)

    return step


def _decode_transformers(model: torch.nn.Module, input_ids: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    with torch.inference_mode():
        prompt = model(input_ids, use_cache=True)

    @torch.inference_mode()
    def step() -> None:
        # the cache is updated in place, so each run continues the last one's text; a step's cost is the same
        cache, token = prompt.cache_params, prompt.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            out = model(token, cache_params=cache, use_cache=True)
            cache, token = out.cache_params, out.logits[:, -1:].argmax(-1)

    return step


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
