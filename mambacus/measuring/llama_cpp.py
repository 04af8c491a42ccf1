"""The side of llama.cpp, through ``llama-cpp-python``: a GGUF file of the same Mamba with the same random weights."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambacus.measuring.cases import Case
from mambacus.measuring.costs import state_bytes
from mambacus.measuring.gguf_file import TYPES
from mambacus.measuring.sides import Step
from mambacus.measuring.timing import prompt_ids
from mambacus.models import load_config


class LlamaCpp:
    """llama.cpp with the model of a case, called below ``llama_cpp.Llama``, which adds its own work to each token."""

    def __init__(self, case: Case, path: Path) -> None:
        import llama_cpp

        self.case, self._api = case, llama_cpp
        config = load_config(f"random:{case.model}")
        self._vocabulary = config.padded_vocab_size
        self.weights_bytes = self.read_bytes = path.stat().st_size
        if not config.tie_embeddings:
            raise ValueError("expected a model with a tied head")
        self._ids = prompt_ids(case, self._vocabulary, torch.device("cpu")).tolist()
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {path.name}")
        self._context = self._made_context()
        self._positions = [0] * case.batch

    def _made_context(self) -> Any:
        case, threads = self.case, self.case.threads or torch.get_num_threads()
        params = self._api.llama_context_default_params()
        params.n_ctx = case.batch * (case.seqlen + case.new_tokens * (case.repeats + case.warmup + 2))
        params.n_batch = max(params.n_batch, case.batch)
        params.n_seq_max = case.batch
        params.n_threads = params.n_threads_batch = threads
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp made no context")
        self._most_tokens = params.n_batch
        self._batch = self._api.llama_batch_init(self._most_tokens, 0, 1)
        return context

    def prefill(self) -> Step:
        """Return a pass over the prompt with the logits of each row's last token."""
        return self._read_prompts

    def decode(self) -> Step:
        """Return greedy steps; each run goes on where the last one ended, at the same cost."""
        first = self._read_prompts()

        def step() -> None:
            self._steps(first, self.case.new_tokens)

        return step

    def generate(self, new_tokens: int) -> Step:
        """Return the greedy loop from prompt to last token."""

        def step() -> None:
            self._steps(self._read_prompts(), new_tokens - 1)

        return step

    def train(self) -> Step:
        """Refuse: llama.cpp does not train a Mamba."""
        raise NotImplementedError("llama.cpp does not train a Mamba")

    def state_bytes(self) -> int | None:
        """Return the bytes of all rows' states, float32 in llama.cpp."""
        return round(state_bytes("llama.cpp", self.case.model, "float32", self.case.batch, 0))

    def facts(self) -> dict[str, object]:
        """Return the file's type and the version of the binding."""
        return {"format": TYPES[self.case.dtype], "llama_cpp_python": self._api.__version__}

    def _read_prompts(self) -> list[int]:
        """Read every row's prompt from the start; return the likeliest next tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._positions = [0] * self.case.batch
        width = max(1, self._most_tokens // self.case.batch)
        for start in range(0, self.case.seqlen, width):
            last = start + width >= self.case.seqlen
            tokens = self._decode([row[start : start + width] for row in self._ids], logits=last)
        return tokens

    def _steps(self, tokens: list[int], count: int) -> None:
        for _ in range(count):
            tokens = self._decode([[token] for token in tokens], logits=True)

    def _decode(self, rows: list[list[int]], *, logits: bool) -> list[int]:
        """Read tokens of every row; return the likeliest next ones if logits are wanted."""
        batch, place, ends = self._batch, 0, []
        for row, tokens in enumerate(rows):
            for token in tokens:
                batch.token[place] = token
                batch.pos[place] = self._positions[row]
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = row
                batch.logits[place] = False
                self._positions[row] += 1
                place += 1
            batch.logits[place - 1] = logits
            ends.append(place - 1)
        batch.n_tokens = place
        if fault := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {fault}")
        return [int(self.logits(end).argmax()) for end in ends] if logits else []

    def logits(self, place: int) -> np.ndarray:
        """Return the logits (vocabulary,) at a place of the last batch."""
        pointer = self._api.llama_get_logits_ith(self._context, place)
        found: np.ndarray = np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))
        return found


def make(case: Case) -> LlamaCpp:
    """Return llama.cpp's side of ``case``; the file is written by another process, whose memory does not count here."""
    with tempfile.TemporaryDirectory(prefix="mambacus-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        command = [sys.executable, "-m", "mambacus.measuring.gguf_file", case.model, case.dtype, str(path)]
        subprocess.run(command, check=True)
        return LlamaCpp(case, path)  # a file that is mapped stays readable when its name is gone
