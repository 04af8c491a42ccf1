"""Our side: the model, the `Decoder` of generation, the `Engine` from end to end, and the finetune path of training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import Tensor, nn

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.decoder import Decoder
from mambacus.measuring.cases import QUANTISED, Case
from mambacus.measuring.sides import Step
from mambacus.measuring.timing import captured, model_bytes, prompt_ids, train_step
from mambacus.models import MambaLM, MambaState, load_config
from mambacus.models.quantised import quantise
from mambacus.models.registry import random_model
from mambacus.runtime.device import resolve_device, resolve_dtype
from mambacus.tuning import frozen
from mambacus.tuning.methods import AdapterSettings, find_method

READ_BEFORE_DECODING = 16  # a Mamba's state is as large after these tokens as after all of a long context


class Ours:
    """`mambacus` with the model of a case."""

    def __init__(self, case: Case, model: MambaLM) -> None:
        self.case, self.model = case, model
        self.weights_bytes, self.read_bytes = model_bytes(model, model.get_input_embeddings())
        self._ids = prompt_ids(case, model.config.vocab_size, model.device)
        self._state: MambaState | None = None
        self._engine: Engine | None = None
        self._held = False  # frozen weights in bfloat16
        self._open = contextlib.ExitStack()  # what stays until this process, which measures one case, ends

    def prefill(self) -> Step:
        """Return a pass over the prompt, replayed as a CUDA graph where the case says so."""
        last = None
        if self.case.logits == "last":
            last = torch.full((self.case.batch, 1), self.case.seqlen - 1, device=self.model.device)

        @torch.inference_mode()
        def step() -> Tensor:
            out = self.model(self._ids, logits_at=last)
            self._state = out.state
            logits: Tensor = out.logits
            return logits

        return captured(step) if self.case.graph else step

    @torch.inference_mode()
    def decode(self) -> Step:
        """Return the `Decoder`'s steps, as the `Engine` does them, without choosing by anything but the maximum."""
        decoder = Decoder(self.model, self.model, self.case.batch, graphs=self.case.graph)
        prompt = self.model(self._ids[:, :READ_BEFORE_DECODING])
        for row in range(self.case.batch):
            decoder.put(prompt.state.narrow(row, 1), row, 1)
        first, self._state = prompt.logits[:, -1].argmax(-1), prompt.state

        @torch.inference_mode()
        def step() -> None:
            token = first
            for _ in range(self.case.new_tokens):
                token = decoder.step(token).argmax(-1)

        return step

    def generate(self, new_tokens: int) -> Step:
        """Return `Engine.generate` on all prompts, or for all samples of one."""
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        if self.case.samples:
            params = dataclasses.replace(params, n=self.case.samples, temperature=1.0)
        return functools.partial(self._generate, self._ids.tolist(), params, None)

    def decode_alone(self) -> Step:
        """Return what `generate` does for samples, but for the prompt: all of it but its last token is read already."""
        params = SamplingParams(
            max_new_tokens=self.case.new_tokens, ignore_eos=True, n=self.case.samples, temperature=1.0
        )
        *beginning, last = self._ids[0].tolist()
        state = self._made_engine().prefill(beginning) if beginning else None
        return functools.partial(self._generate, [[last]], params, state)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens that generating has read so far."""
        return self._made_engine().stats.prompt_tokens

    def _made_engine(self) -> Engine:
        rows = self.case.samples or self.case.batch
        self._engine = self._engine or Engine(self.model, batch_size=rows)
        return self._engine

    def _generate(self, prompts: list[list[int]], params: SamplingParams, state: MambaState | None) -> None:
        completions = self._made_engine().generate(prompts, params, state)
        counts = {len(one.token_ids) for row in completions for one in row}
        if counts != {params.max_new_tokens}:
            raise RuntimeError(f"expected {params.max_new_tokens} new tokens a row, got {sorted(counts)}")
        self._state = MambaState.zeros(
            self.model.config, sum(map(len, completions)), device="meta", dtype=self.model.dtype
        )

    def train(self) -> Step:
        """Return the trainer's pass, which keeps no logits; LoRA is attached as ``finetune --method lora`` does."""
        model: nn.Module = self.model
        if self.case.method == "lora":
            model = find_method("lora").attach(self.model, AdapterSettings(rank=16))
        model.train()
        autocast = torch.bfloat16 if self.case.dtype == "mixed" else None
        self._held = frozen.choose(model, self.model.device, autocast).used
        if self._held:
            self._open.enter_context(frozen.FrozenWeights(model))

        def loss() -> Tensor:
            found: Tensor = model(input_ids=self._ids, labels=self._ids, loss_only=True).loss
            return found

        step = functools.partial(train_step, model, loss, self.case)
        return captured(step) if self.case.graph else step

    def state_bytes(self) -> int | None:
        """Return the bytes of all rows' states."""
        return None if self._state is None else self._state.conv_state.nbytes + self._state.ssm_state.nbytes

    def facts(self) -> dict[str, object]:
        """Return where LoRA sits and whether frozen weights are bfloat16; what quantised ones are multiplied with."""
        if self.case.dtype in QUANTISED:
            return {"activations": str(self.model.dtype).removeprefix("torch.")}
        if self.case.method == "lora":
            return {"lora_targets": ["in_proj", "out_proj"], "frozen_bfloat16": self._held}
        return {}


def make(case: Case) -> Ours:
    """Return our side of ``case``."""
    dtype = torch.float32 if case.dtype in ("mixed", *QUANTISED) else resolve_dtype(case.dtype)
    model = random_model(load_config(f"random:{case.model}"), device=resolve_device(case.device)).to(dtype).eval()
    if case.dtype in QUANTISED:
        quantise(model, case.dtype)
    return Ours(case, model)
