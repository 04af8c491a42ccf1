"""Training a small model from scratch on streams of tokens: one plain loop, made for a GPU that must not wait.

All tokens lie on the device; a batch is windows at drawn places of the streams, mixed by weight. Nothing is read back
from the device between two log lines. The end-of-text token that leads each document resets the state through
`seq_idx`. Batches depend on the seed and the step alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambacus.models import MambaLM
from mambacus.runtime.errors import UserError
from mambacus.runtime.graphs import CudaRecorder
from mambacus.runtime.memory import PeakMemory
from mambacus.tuning import graphs
from mambacus.tuning.audit import TrainingStoppedError
from mambacus.tuning.optimiser import parameter_groups

CHECKPOINT = "checkpoint.pt"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train; the defaults are those of ``mambacus pretrain``.

    Attributes:
        steps: optimiser steps, unless ``max_minutes`` ends the run before.
        max_minutes: minutes of training after which the schedule is at its end; 0 for no limit.
        batch: rows of one step.
        seqlen: tokens of a row.
        learning_rate: peak of the schedule.
        weight_decay: AdamW's; never applied to A_log, D, norms and biases.
        warmup: share of the run in which the rate rises from 0.
        decay: share of the run, at its end, in which the rate falls to 0.
        clip: largest norm of the gradient.
        weights: share of each stream in a batch; normalised.
        seed: of the batches.
        log_every: steps between two log lines.
        save_every: steps between two checkpoints.
    """

    steps: int
    max_minutes: float
    batch: int
    seqlen: int
    learning_rate: float
    weight_decay: float
    warmup: float
    decay: float
    clip: float
    weights: Mapping[str, float]
    seed: int
    log_every: int
    save_every: int


def rate_factor(progress: float, warmup: float, decay: float) -> float:
    """Return the share of the peak rate at ``progress`` (0 to 1): a linear rise, a plateau, a linear fall to 0."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, max(0.0, (1.0 - progress) / decay)) if decay else 1.0


class Mixture:
    """Streams of tokens on a device, from which batches of windows are drawn.

    Args:
        streams: name -> uint16 (n,) token ids, each document led by ``eos_id``.
        weights: name -> share of the rows; 0 leaves a stream out.
        seqlen: tokens of a window.
        eos_id: the token that starts a document.
        device: where the tokens go, 4 bytes each.

    Raises:
        UserError: a weight for a stream that is not there, or a stream shorter than a window.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        seqlen: int,
        eos_id: int,
        device: torch.device,
    ) -> None:
        self.names = [name for name, weight in weights.items() if weight > 0]
        for name in self.names:
            if name not in streams or len(streams[name]) <= seqlen + 1:
                have = len(streams[name]) if name in streams else 0
                raise UserError(f"stream {name!r}: expected more than {seqlen + 1} tokens, got {have}")
        shares = np.array([weights[name] for name in self.names])
        self.shares = shares / shares.sum()
        self.sizes = np.array([len(streams[name]) for name in self.names])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.seqlen, self.eos_id, self.device = seqlen, eos_id, device
        flat = np.concatenate([streams[name] for name in self.names]).astype(np.int32)
        self.tokens = torch.from_numpy(flat).to(device)
        self._window = torch.arange(seqlen + 1, device=device)

    def batch(self, rows: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``input_ids``, ``targets`` int64 (rows, seqlen) and ``seq_idx`` int32 (rows, seqlen) of one step."""
        draw = np.random.default_rng((seed, step))
        stream = draw.choice(len(self.names), size=rows, p=self.shares)
        places = self.starts[stream] + (draw.random(rows) * (self.sizes[stream] - self.seqlen - 1)).astype(np.int64)
        offsets = torch.from_numpy(places)
        if self.device.type == "cuda":
            offsets = offsets.pin_memory().to(self.device, non_blocking=True)
        windows = self.tokens[offsets[:, None] + self._window].long()  # (rows, seqlen + 1)
        return split_windows(windows, self.eos_id)


def split_windows(windows: Tensor, eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets and seq_idx of windows int64 (rows, seqlen + 1); a document starts at each ``eos_id``."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return inputs, targets, (inputs == eos_id).cumsum(1, dtype=torch.int32)


def stream_loss(model: MambaLM, inputs: Tensor, targets: Tensor, seq_idx: Tensor) -> Tensor:
    """Return the mean cross entropy of the next tokens, float32 ().

    Unlike the model's own loss it scores the end-of-text token that opens the next document: a model learns to stop.
    """
    logits = model(inputs, seq_idx=seq_idx).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# The loop


class Pretraining:
    """One run: model, optimiser, batches and history, from step 0 or a checkpoint.

    Args:
        model: float32 parameters on their device.
        mixture: the training batches.
        plan: how to train.
        folder: receives `CHECKPOINT`.
        compiled: run the model through ``torch.compile``.
        cuda_graph: whether passes are recorded as CUDA graphs: ``auto``, ``on`` or ``off``.
    """

    def __init__(
        self,
        model: MambaLM,
        mixture: Mixture,
        plan: Plan,
        folder: Path,
        *,
        compiled: bool = False,
        cuda_graph: str = "auto",
    ) -> None:
        self.model, self.mixture, self.plan = model, mixture, plan
        self.path = folder / CHECKPOINT
        self.device = model.device
        cuda = self.device.type == "cuda"
        self._forward: Any = torch.compile(model) if compiled else model
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=cuda)
        groups = parameter_groups(model, plan.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=cuda)
        self._graph = graphs.choose(cuda_graph, model, self.device)
        if compiled and self._graph.used:
            self._graph = graphs.Choice(False, "--compile")
        self._passes: graphs.Passes | None = None
        if self._graph.used:
            recorder = CudaRecorder(self.device)
            self._passes = graphs.Passes(self._pass, model, [*model.parameters()], {}, recorder)
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.validation: list[dict[str, Any]] = []
        self._loss_sum = torch.zeros((), device=self.device)
        self._memory = PeakMemory(self.device)
        self._memory.restart()

    @property
    def progress(self) -> float:
        """How far the run is: by steps or, with a time limit, by time if that is further; 1 at the end."""
        by_time = self.seconds / (60 * self.plan.max_minutes) if self.plan.max_minutes else 0.0
        return min(1.0, max(self.step / self.plan.steps, by_time))

    def run_until(self, step: int) -> None:
        """Train to ``step``, or to the end of the schedule if that comes first.

        Raises:
            TrainingStoppedError: the loss is not finite; the last checkpoint is from before.
        """
        self.model.train()
        began, before = time.perf_counter(), self.seconds
        while self.step < step and self.progress < 1:
            self._one_step()
            saves = self.step % self.plan.save_every == 0
            if saves or self.step % self.plan.log_every == 0 or self.step == self.plan.steps:
                self._log()  # waits for the device, so the clock below is right here
            self.seconds = before + time.perf_counter() - began
            if saves:  # after the log, which lets no loss pass that is not finite
                self.save()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = before + time.perf_counter() - began

    def _one_step(self) -> None:
        rate = self.plan.learning_rate * rate_factor(self.progress, self.plan.warmup, self.plan.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets, seq_idx = self.mixture.batch(self.plan.batch, self.plan.seed, self.step)
        batch = {"inputs": inputs, "targets": targets, "seq_idx": seq_idx}
        loss = self._passes.run(batch) if self._passes else self._pass(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss
        self.step += 1

    def _pass(self, batch: graphs.Batch) -> Tensor:
        with self._autocast:
            loss = stream_loss(self._forward, **batch)
        loss.backward()
        return loss.detach()

    def _log(self) -> None:
        steps = self.step - (int(self.history[-1]["step"]) if self.history else 0)
        loss = self._loss_sum.item() / max(1, steps)
        self._loss_sum.zero_()
        if not math.isfinite(loss):
            last = int(self.history[-1]["step"]) if self.history else 0
            raise TrainingStoppedError(
                f"the loss became {loss} between steps {last} and {self.step}; lower --lr; {self.path} is from before"
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append({"step": self.step, "loss": round(loss, 4), "learning_rate": rate})
        speed = self.step * self.plan.batch * self.plan.seqlen / max(self.seconds, 1e-9) / 1e3
        done = f"step {self.step}  {100 * self.progress:.0f} %"
        print(f"{done}  loss {loss:.3f}  rate {rate:.2e}  {speed:.0f} k tokens/s", flush=True)

    # Checkpoints

    def save(self) -> None:
        """Write the run's state to `CHECKPOINT`, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "validation": self.validation,
            "loss_sum": self._loss_sum,
        }
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def restore(self) -> bool:
        """Go on from `CHECKPOINT` if there is one; return whether there was.

        Raises:
            UserError: it cannot be read.
        """
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path}: not a checkpoint of this run ({type(error).__name__})") from None
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.validation = state["history"], state["validation"]
        self._loss_sum = state["loss_sum"].to(self.device)
        return True

    def summary(self) -> dict[str, Any]:
        """Return the entries ``train``, ``history`` and ``validation`` of the record."""
        tokens = self.step * self.plan.batch * self.plan.seqlen
        return {
            "train": {
                "steps": self.step,
                "tokens": tokens,
                "seconds": round(self.seconds, 1),
                "tokens_per_second": round(tokens / self.seconds) if self.seconds else 0,
                "loss_first": self.history[0]["loss"] if self.history else None,
                "loss_last": self.history[-1]["loss"] if self.history else None,
                "peak_memory_bytes": self._memory.read(),
                "peak_memory_of": self._memory.of,
            },
            "history": self.history,
            "validation": self.validation,
            "cuda_graph": self._graph.facts(self._passes.counts if self._passes else None),
        }


# What the model can do


@torch.inference_mode()
def perplexity(
    model: MambaLM, tokens: np.ndarray, text_bytes: int, plan: Plan, eos_id: int, limit: int
) -> dict[str, float]:
    """Score a held-out stream in windows of ``plan.seqlen`` tokens.

    Args:
        model: the model; its device and dtype are used.
        tokens: uint16 (n,).
        text_bytes: length of the whole stream's text.
        plan: window and batch size.
        eos_id: the token that starts a document.
        limit: score at most about this many tokens.

    Returns:
        ``loss`` (nats a token), ``perplexity`` (a token), ``bits_per_byte``.
    """
    model.eval()
    seqlen = min(plan.seqlen, len(tokens) - 1)
    rows = max(1, min(limit, len(tokens) - 1) // seqlen)
    flat = torch.from_numpy(tokens[: rows * seqlen + 1].astype(np.int64)).to(model.device)
    windows = torch.stack([flat[row * seqlen : (row + 1) * seqlen + 1] for row in range(rows)])
    cuda = model.device.type == "cuda"
    total = 0.0
    for part in windows.split(plan.batch):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            total += stream_loss(model, *split_windows(part, eos_id)).item() * len(part)
    loss = total / rows
    bits = loss / math.log(2) * len(tokens) / text_bytes
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3), "bits_per_byte": round(bits, 4)}


@torch.inference_mode()
def sums_right(model: MambaLM, tokenizer: Any, sums: list[tuple[str, str]], eos_id: int, pad_id: int) -> float:
    """Return the share of sums whose result greedy decoding gives.

    One pass decides it: greedy decoding gives the result if each of its tokens is the likeliest after the right ones.

    Args:
        model: the model.
        tokenizer: has ``encode(text, add_special_tokens=False) -> list[int]``.
        sums: pairs such as ``("17 + 25 =", " 42")``.
        eos_id: led before each sum, as before every document.
        pad_id: fills the rows at the right.
    """
    model.eval()
    rows = []
    for prompt, result in sums:
        head = tokenizer.encode(prompt, add_special_tokens=False)
        rows.append((1 + len(head), [eos_id, *head, *tokenizer.encode(result, add_special_tokens=False)]))
    longest = max(len(ids) for _, ids in rows)
    inputs = torch.full((len(rows), longest), pad_id)
    seq_idx = torch.full((len(rows), longest), -1, dtype=torch.int32)
    scored = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, (start, ids) in enumerate(rows):
        inputs[row, : len(ids)] = torch.tensor(ids)
        seq_idx[row, : len(ids)] = 0
        scored[row, start - 1 : len(ids) - 1] = True  # the positions that predict the result's tokens
    inputs, seq_idx, scored = (tensor.to(model.device) for tensor in (inputs, seq_idx, scored))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        likeliest = model(inputs, seq_idx=seq_idx).logits.argmax(-1)
    wrong = (likeliest[:, :-1] != inputs[:, 1:]) & scored[:, :-1]
    return (~wrong.any(1)).float().mean().item()


@torch.inference_mode()
def samples(
    model: MambaLM, tokenizer: Any, prompts: Sequence[str], eos_id: int, tokens: int = 60
) -> list[dict[str, str]]:
    """Return how the model goes on from ``prompts``, drawn at temperature 0.7: ``{"prompt": ..., "text": ...}``.

    Each token costs a pass over all before it: slow, but it needs nothing that training did not use.
    """
    model.eval()
    found = []
    for number, prompt in enumerate(prompts):
        draw = torch.Generator().manual_seed(number)
        ids = [eos_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        start = len(ids)
        while len(ids) < start + tokens:
            logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()
            ids.append(int(torch.multinomial(F.softmax(logits / 0.7, -1), 1, generator=draw)))
            if ids[-1] == eos_id:
                break
        found.append({"prompt": prompt, "text": tokenizer.decode(ids[start:])})
    return found
