"""The side of transformers: its Mamba, and Transformers of published shapes with SDPA attention and a KV cache.

Eager as ``from_config`` makes it, with the cache that grows; or, where a case says graph, as transformers documents
it for speed: a static cache and ``torch.compile``, for decoding in the mode that replays CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacus.measuring.cases import Case
from mambacus.measuring.shapes import LORA_TARGETS, SHAPES
from mambacus.measuring.sides import Step
from mambacus.measuring.timing import model_bytes, prompt_ids, train_step
from mambacus.models import load_config
from mambacus.runtime.device import resolve_device, resolve_dtype

_LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "task_type": "CAUSAL_LM",
}  # as our method `lora`
_READ_BEFORE_DECODING = 16  # by a Mamba, whose state does not grow


class HuggingFace:
    """A causal LM of transformers for a case."""

    def __init__(self, case: Case, model: Any) -> None:
        self.case, self.model = case, model
        self.is_mamba = case.implementation not in SHAPES
        self.weights_bytes, self.read_bytes = model_bytes(model, model.get_input_embeddings())
        self._ids = prompt_ids(case, model.config.vocab_size, model.device)
        self._cache: Any = None
        self._step_forward: Callable[..., Any] = model
        if case.graph and case.benchmark in ("decode", "generate", "samples"):
            mode = "reduce-overhead" if case.device.startswith("cuda") else "default"
            self._step_forward = torch.compile(model.forward, mode=mode, dynamic=False)

    def prefill(self) -> Step:
        """Return a pass over the prompt that fills a cache."""
        forward = torch.compile(self.model.forward, dynamic=False) if self.case.graph else self.model
        keep = {"logits_to_keep": 1} if self.case.logits == "last" else {}

        @torch.inference_mode()
        def step() -> Tensor:
            out = forward(self._ids, use_cache=True, **keep)
            self._cache = self._cache_of(out)
            logits: Tensor = out.logits
            return logits

        return step

    @torch.inference_mode()
    def decode(self) -> Step:
        """Return greedy steps after a context whose keys and values are random numbers: what they are costs nothing.

        A Mamba reads a few tokens instead, as ours does.
        """
        if self.is_mamba:
            out = self.model(self._ids[:, :_READ_BEFORE_DECODING], use_cache=True, logits_to_keep=1)
            self._cache = out.cache_params
        else:
            self._cache = self._empty_cache(self.case.seqlen + self.case.new_tokens)
            self._fill(self._cache)
        first = self._ids[:, -1:]

        @torch.inference_mode()
        def step() -> None:
            self._rewind()
            self._steps(first, self.case.new_tokens)

        return step

    def generate(self, new_tokens: int) -> Step:
        """Return the greedy loop itself: ``model.generate`` does the same with more bookkeeping a token."""
        ids = self._ids.repeat_interleave(self.case.samples or 1, dim=0)
        static = self._empty_cache(self.case.seqlen + self.case.new_tokens) if self.case.graph else None

        @torch.inference_mode()
        def step() -> None:
            self._cache = static
            if static is not None:
                static.reset()  # graphs remember its addresses
            out = self.model(ids, use_cache=True, logits_to_keep=1, **self._cache_argument())
            self._cache = self._cache_of(out)
            self._steps(out.logits[:, -1:].argmax(-1), new_tokens - 1)

        return step

    def train(self) -> Step:
        """Return a forward and backward pass, under PEFT's LoRA if the case says so."""
        model = self.model
        if self.case.method == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=list(self._lora_targets()), **_LORA))
        model.train()
        forward = torch.compile(model, dynamic=False) if self.case.graph else model

        def loss() -> Tensor:
            found: Tensor = forward(input_ids=self._ids, labels=self._ids, use_cache=False).loss
            return found

        return functools.partial(train_step, model, loss, self.case)

    def state_bytes(self) -> int | None:
        """Return the bytes of the cache, a static one's unused places included."""
        if self._cache is None:
            return None
        return sum(tensor.nbytes for layer in self._cache.layers for tensor in _tensors(layer))

    def facts(self) -> dict[str, object]:
        """Return how attention runs, what is compiled, and where LoRA sits."""
        facts: dict[str, object] = {} if self.is_mamba else {"attention": self.model.config._attn_implementation}
        if self.case.graph:
            facts["compiled"] = "torch.compile" + (
                ", static cache" if self.case.benchmark in ("decode", "generate", "samples") else ""
            )
        return facts | ({"lora_targets": list(self._lora_targets())} if self.case.method == "lora" else {})

    def _lora_targets(self) -> tuple[str, ...]:
        """Return where LoRA goes; PEFT refuses it on ``out_proj`` of transformers' Mamba."""
        return ("in_proj",) if self.is_mamba else LORA_TARGETS[self.model.config.model_type]

    def _steps(self, token: Tensor, count: int) -> None:
        for _ in range(count):
            if self.case.graph:
                torch.compiler.cudagraph_mark_step_begin()
            out = self._step_forward(token, use_cache=True, **self._cache_argument())
            token = out.logits[:, -1:].argmax(-1)

    def _cache_argument(self) -> dict[str, Any]:
        return {"cache_params" if self.is_mamba else "past_key_values": self._cache}

    def _cache_of(self, out: Any) -> Any:
        return out.cache_params if self.is_mamba else out.past_key_values

    def _empty_cache(self, tokens: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.case.graph and not self.is_mamba:
            return StaticCache(config=self.model.config, max_cache_len=tokens)
        return DynamicCache(config=self.model.config)  # a Mamba's part of it has fixed addresses as it is

    def _fill(self, cache: Any) -> None:
        """Write ``seqlen`` random keys and values a row into every layer."""
        shape = SHAPES[self.case.implementation]
        size = (self.case.batch, shape.n_head, self.case.seqlen, shape.d_model // shape.n_head)
        for layer in range(shape.n_layer):
            keys = torch.randn(size, device=self.model.device, dtype=self.model.dtype)
            cache.update(keys, torch.randn_like(keys), layer)

    def _rewind(self) -> None:
        """Set a Transformer's cache back to the context; a Mamba goes on from where it is, at the same cost."""
        if self.is_mamba:
            return
        for layer in self._cache.layers:
            if self.case.graph:
                layer.cumulative_length.fill_(self.case.seqlen)
            else:
                layer.keys, layer.values = (t[..., : self.case.seqlen, :] for t in (layer.keys, layer.values))


def _tensors(layer: Any) -> list[Tensor]:
    """Return the tensors of one layer of a cache: keys and values, or a Mamba's two states."""
    if hasattr(layer, "keys"):
        return [layer.keys, layer.values]
    found: list[Tensor] = []
    for states in (layer.conv_states, layer.recurrent_states):
        found += states.values() if isinstance(states, dict) else states
    return found


def make(case: Case) -> HuggingFace:
    """Return transformers' side of ``case``."""
    import transformers

    transformers.logging.set_verbosity_error()
    if case.implementation in SHAPES:
        config = SHAPES[case.implementation].config(case.seqlen + case.new_tokens)
    else:
        config = transformers.MambaConfig(**load_config(f"random:{case.model}").to_hf("float32"))
    attention = "sdpa" if config.model_type != "gpt_neo" else "eager"  # transformers has no SDPA for GPT-Neo
    dtype = torch.float32 if case.dtype == "mixed" else resolve_dtype(case.dtype)
    with torch.device(resolve_device(case.device)):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, **({} if config.model_type == "mamba" else {"attn_implementation": attention})
        )
    return HuggingFace(case, model.eval())
