"""Which implementation runs a model, and any other Hugging Face causal LM behind the interface of our engine."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mambacus.inference import Completion, SamplingParams
from mambacus.models import model_type
from mambacus.models.adapters import adapter_folder
from mambacus.models.registry import resolve
from mambacus.runtime.errors import UserError

# What transformers lets through from its parts when the files of a model are not what it takes them for.
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def choose_implementation(model: str, implementation: str) -> str:
    """Return ``mambacus`` for Mamba models and ``hf`` (transformers) for all others, or what was forced.

    Args:
        model: name as in `mambacus.models.load`.
        implementation: ``auto``, ``mambacus`` or ``hf``.

    Raises:
        UserError: no such model; ours was forced for another architecture, or transformers for a random model.
    """
    architecture = model_type(model)
    if implementation == "auto":
        return "mambacus" if architecture == "mamba" else "hf"
    if implementation == "mambacus" and architecture != "mamba":
        raise UserError(f"--implementation mambacus: runs Mamba models, {model!r} is of type {architecture!r}")
    if implementation == "hf" and model.startswith("random:"):
        raise UserError(f"--implementation hf: needs a model folder or hub id, got {model!r}")
    return implementation


def load_baseline(model: str, device: torch.device, dtype: torch.dtype, adapter: Path | None) -> tuple[Any, Any]:
    """Return a transformers causal LM in evaluation mode and its tokenizer, padding on the left.

    Raises:
        UserError: transformers or PEFT cannot read it, with their reason; or they read it where weights or a tokenizer
            are missing, which transformers replaces by random weights and an empty vocabulary.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = _location(model)
    folder = None if adapter is None else adapter_folder(adapter)
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name)
            reader: Any = AutoModelForCausalLM  # its annotation leaves out that it returns two values here
            loaded, found = reader.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except _UNREADABLE as error:
        raise UserError(f"transformers cannot load {model!r}: {' '.join(str(error).split())[:300]}") from None
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UserError(f"{model!r}: its files lack {len(lacking)} weights: {', '.join(lacking[:3])}")
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"{model!r}: no tokenizer beside the model")
    if folder is not None:
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, folder)
        except _UNREADABLE as error:
            raise UserError(
                f"--adapter {adapter}: does not fit {model!r}: {' '.join(str(error).split())[:300]}"
            ) from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded.to(device).eval(), tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bar and its notes on a loaded model: what matters in them is an error here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _location(model: str) -> str:
    """Return an absolute path for a model on this machine, so that nothing looks it up on the hub, else the hub id."""
    folder = resolve(model).folder if model == "tiny" else Path(model).expanduser()
    return str(folder.resolve()) if folder is not None and folder.is_dir() else model


class BaselineEngine:
    """`mambacus.inference.Engine.generate` for a transformers model: left padding, batches sorted by length.

    Args:
        model: from `load_baseline`.
        tokenizer: from `load_baseline`.
        batch_size: prompts of one batch.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def generate(
        self, prompts: Sequence[str], params: SamplingParams, *, progress: Callable[[int], object] = lambda n: None
    ) -> list[list[Completion]]:
        """Return ``params.n`` completions of each prompt, in order; ``progress`` is told of each batch of prompts done.

        Sampling draws from torch's generator, seeded once a batch: unlike our engine's, a sample depends on its batch.
        """
        completions: list[list[Completion]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            for index, found in zip(batch, self._batch([prompts[i] for i in batch], params, begin), strict=True):
                completions[index] = found
            progress(len(batch))
        return completions

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[str], params: SamplingParams, offset: int) -> list[list[Completion]]:
        encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        encoded.pop("token_type_ids", None)  # of no meaning to a decoder
        torch.manual_seed(params.seed + offset)
        sequences = self.model.generate(
            **encoded, **_generation_options(params), tokenizer=self.tokenizer, pad_token_id=self.tokenizer.pad_token_id
        )
        new_tokens = sequences[:, encoded["input_ids"].shape[1] :].tolist()
        found = [self._completion(tokens, params) for tokens in new_tokens]
        return [found[begin : begin + params.n] for begin in range(0, len(found), params.n)]

    def _completion(self, tokens: list[int], params: SamplingParams) -> Completion:
        """Cut one row at its first end: rows of a batch go on, or are padded, until the last of them has ended."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or [])
        for length, token in enumerate(tokens, start=1):
            if token in ends:
                return Completion(self._text(tokens[: length - 1]), tokens[:length], "eos")
            text = self._text(tokens[:length]) if params.stop else ""
            cuts = [text.find(stop) for stop in params.stop if stop in text]
            if cuts:
                return Completion(text[: min(cuts)], tokens[:length], "stop")
        return Completion(self._text(tokens), tokens, "length")

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generation_options(params: SamplingParams) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": params.max_new_tokens, "num_return_sequences": params.n}
    options |= {"stop_strings": list(params.stop)} if params.stop else {}
    if params.repetition_penalty != 1.0:
        options["repetition_penalty"] = params.repetition_penalty
    if params.temperature == 0:
        return options | {"do_sample": False}
    options |= {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    return options | ({"min_p": params.min_p} if params.min_p else {})
