"""Fine-tuning on ``transformers.Trainer``'s loop: our loss, optimiser groups, schedule, audit and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mambacus.runtime.device import has_bfloat16
from mambacus.runtime.errors import UserError
from mambacus.runtime.graphs import CudaRecorder
from mambacus.runtime.memory import PeakMemory
from mambacus.tuning import frozen, graphs, processes, sharding, spikes
from mambacus.tuning.audit import FrozenCheck, GradientAudit, TrainingStoppedError, first_bad_module, trainable
from mambacus.tuning.checkpoints import STAGING, newest_checkpoint, read_notes, write_checkpoint
from mambacus.tuning.optimiser import parameter_groups, rate_factor
from mambacus.tuning.packing import PADDING_VALUES, PlannedBatches
from mambacus.tuning.peft_methods import base_of
from mambacus.tuning.progress import Progress, tensorboard
from mambacus.tuning.spikes import SpikeStop

_WEIGHTS = "trainable.safetensors"
_HISTORY_POINTS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        folder: receives ``checkpoints/`` and ``tensorboard/``.
        device: where to train.
        autocast: torch.bfloat16, or None for plain float32.
        learning_rate: the peak.
        weight_decay: AdamW's; never applied to A_log, D, norms and biases.
        grad_accum: micro-batches of one step.
        save_every: steps between checkpoints.
        seed: of dropout (the order of the data is the plan's).
        warmup: share of the steps in which the rate rises.
        clip: largest gradient norm.
        cuda_graph: whether passes are recorded as CUDA graphs: ``auto``, ``on`` or ``off``.
        spike_stop: stop where the loss leaps and stays up, as `spikes` says.
    """

    folder: Path
    device: torch.device
    autocast: torch.dtype | None
    learning_rate: float
    weight_decay: float = 0.01
    grad_accum: int = 1
    save_every: int = 100
    seed: int = 0
    warmup: float = 0.03
    clip: float = 1.0
    cuda_graph: str = "auto"
    spike_stop: bool = True


def choose_autocast(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return torch.bfloat16 where it is asked for and the device multiplies it in hardware, else None (float32).

    ``auto`` takes bfloat16 where there is hardware for it. Master weights, gradients and optimiser stay float32.

    Raises:
        UserError: float16, any other name, or bfloat16 where it would be emulated.
    """
    if dtype == "float16":
        raise UserError(
            "--dtype float16: refused; gradients of the recurrence and of the step projection leave its range (6e-8 to "
            "65504) and become 0 or infinite; use bfloat16 or float32"
        )
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype: expected auto, float32 or bfloat16, got {dtype!r}")
    able = has_bfloat16(device)
    if dtype == "bfloat16" and not able:
        raise UserError(
            f"--dtype bfloat16: this {device.type} has no bfloat16 arithmetic and would emulate it; use float32"
        )
    return torch.bfloat16 if able and dtype != "float32" else None


def train(
    model: nn.Module,
    data: PlannedBatches,
    settings: Settings,
    *,
    quiet_first: Callable[[str], bool] = lambda name: False,
    rate_of: Callable[[str], float] = lambda name: 1.0,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the parameters of ``model`` that require a gradient, in place, and return the figures for the record.

    Args:
        model: a `MambaLM`, or what a method made of it.
        data: the micro-batches of the whole run.
        settings: how to train.
        quiet_first: names of tensors whose gradient is zero at the very first step by construction.
        rate_of: by how much the rate of the tensor of that name is multiplied.
        resume: continue from the newest whole checkpoint in ``settings.folder``, if there is one.

    Returns:
        ``{"train": {...}, "history": [...], "cuda_graph": {...}, "frozen_bfloat16": {...}}`` as docs/architecture.md
        lists them.

    Raises:
        TrainingStoppedError: a trainable tensor takes no part, the loss or a gradient is not finite, or the loss leaps
            and stays up.
        UserError: a checkpoint cannot be written or read.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TypeError(f"{name} is trained in {parameter.dtype}; master weights are float32")
    checkpoint = newest_checkpoint(settings.folder / "checkpoints") if resume else None
    earlier = read_notes(checkpoint) if checkpoint else {}
    trainer = MambaTrainer(model, data, settings, quiet_first, rate_of, earlier)
    unchanged = FrozenCheck(model)
    memory = PeakMemory(settings.device)
    memory.restart()  # the process may have trained, or asked a base model, before
    trainer.run(checkpoint)
    unchanged.verify(model)
    history = [
        {key: entry[key] for key in ("step", "loss", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    seconds = trainer.seconds
    figures = {
        "steps": trainer.state.global_step,
        "tokens": data.plan.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(data.plan.tokens / seconds, 1),
        "loss_first": history[0]["loss"],
        "loss_last": history[-1]["loss"],
        "peak_memory_bytes": memory.read(),
        "peak_memory_of": memory.of,
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
    }
    facts = {"cuda_graph": trainer.graph_facts(), "frozen_bfloat16": trainer.frozen_facts()}
    return {"train": figures, "history": history} | facts


class Learner(nn.Module):
    """A model and its loss as one module, which is what the Trainer calls.

    Args:
        model: the model with its trainable parameters.
        autocast: dtype of the matrix products, or None.
    """

    accepts_loss_kwargs = True  # makes the Trainer count the labels over all micro-batches of a step

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        seq_idx: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed cross entropy of the labelled tokens, in nats, over ``num_items_in_batch``."""
        with torch.autocast(input_ids.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            output = self.model(
                input_ids=input_ids,
                seq_idx=seq_idx,
                labels=labels,
                loss_only=True,
                num_items_in_batch=num_items_in_batch,
            )
        loss: torch.Tensor = output.loss
        return loss


class MambaTrainer(Trainer):
    """The Trainer's loop with our parts in its places."""

    def __init__(
        self,
        model: nn.Module,
        data: PlannedBatches,
        settings: Settings,
        quiet_first: Callable[[str], bool],
        rate_of: Callable[[str], float],
        earlier: dict[str, Any],
    ) -> None:
        self.settings = settings
        self._rate_of = rate_of
        self._earlier_seconds = float(earlier.get("seconds", 0.0))
        self._started = 0.0
        self.learner = Learner(model, settings.autocast)
        self._checkpoints = settings.folder / "checkpoints"
        self._staging: Path | None = None
        self._whole: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None  # weights and optimiser, to be saved
        self._audit = GradientAudit(model, quiet_first)
        self._watch = SpikeStop(self._audit, earlier.get("losses", ()))
        self._step_loss: torch.Tensor | None = None  # of the micro-batches of this step so far
        self._graph = graphs.choose(settings.cuda_graph, model, settings.device)
        self._passes: graphs.Passes | None = None
        self._casts = frozen.choose(model, settings.device, settings.autocast)
        self._frozen: frozen.FrozenWeights | None = None
        super().__init__(
            model=self.learner,
            args=_arguments(settings, data.plan.steps),
            train_dataset=data,
            data_collator=_only_item,
            callbacks=[self._audit, self._watch, Progress(data), tensorboard(settings.folder)],
        )
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate share the model out if this run was launched so."""
        super().create_accelerator_and_postprocess()
        if processes.is_sharded():
            sharding.use_plugin(self.accelerator, self.learner)
            self.is_fsdp_enabled = True

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from ``checkpoint`` if there is one."""
        self._started = time.perf_counter()
        if self._casts.used:
            self._frozen = frozen.FrozenWeights(self.learner.model)
        with self._frozen or contextlib.nullcontext():
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:  # the weights that are put back may need the memory
                if self._passes is not None:
                    self._passes.release()

    @property
    def seconds(self) -> float:
        """Seconds spent training, those before a resumed checkpoint included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW on `parameter_groups`."""
        if self.optimizer is None:
            learner = self.learner if model is None else model
            groups = parameter_groups(learner, self.settings.weight_decay, self._rate_of)
            for group in groups:
                group["lr"] = self.settings.learning_rate * group.pop("rate")
            self.optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.999), fused=True)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule of `rate_factor`; unlike the Trainer's own, its first step has a rate above zero."""
        if self.lr_scheduler is None:
            warmup = max(1, round(self.settings.warmup * num_training_steps))
            factor = functools.partial(rate_factor, total=num_training_steps, warmup=warmup)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch over the number of trained tokens of the *whole step*.

        Summed over the micro-batches it is the mean over the step's tokens, so splitting a step keeps its gradient. Of
        several processes, whose gradients are averaged, each gives its part times their number.
        """
        if num_items_in_batch is None:
            raise RuntimeError("the Trainer did not count the trained tokens of this step")
        loss = model(**inputs, num_items_in_batch=num_items_in_batch) * processes.world_size()
        return (loss, {}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward; stop before the update if the loss is not finite, or leapt and stays up.

        The steps that the audit looks at closely run as they are, those after them from recordings if that was chosen.
        """
        if self._graph.used and self._audit.settled:
            count = torch.as_tensor(num_items_in_batch, device=self.settings.device)
            loss = self._recorded_passes().run({**self._prepare_inputs(inputs), "num_items_in_batch": count})
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        bad = ~loss.isfinite()
        if sharding.anywhere(bad) if processes.is_sharded() else bad:
            seen = [(loss.item(), self._first_bad_module(inputs))]
            seen = processes.gather(seen[0]) if processes.is_sharded() else seen
            value, where = next(pair for pair in seen if not math.isfinite(pair[0]))
            raise TrainingStoppedError(
                f"step {self.state.global_step + 1}: the loss is {value}, first seen in {where}; {self._kept()}"
            )
        if self.settings.spike_stop:
            self._look_at(loss, inputs)
        return loss

    def _look_at(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Add up the loss of the step; at its last micro-batch, stop the run if the loss leapt and stays up."""
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if not self.accelerator.sync_gradients:
            return
        value, self._step_loss = spikes.step_loss(self._step_loss), None
        watch = self._watch.losses
        if not watch.see(value):
            return
        step = self.state.global_step + 1
        first = step - len(watch.suspect) + 1
        found = processes.gather(self._first_bad_module(inputs))
        where = next((name for name in found if not name.startswith("no module")), None)
        grown = self._watch.named()
        if where:
            named = f"a number that is not finite is first seen in {where}"
        elif grown:
            named = f"all numbers are finite; whose share of the gradient grew most at step {first} is {grown}"
        else:
            named = "all numbers are finite and no module can be named"
        raise TrainingStoppedError(
            f"step {step}: the loss is {value:.3g} and has been far above {watch.median:.3g}, the median before, since "
            f"step {first}; {named}; {self._kept(first - 2)}; a lower --lr may help, --no-spike-stop goes on"
        )

    def _first_bad_module(self, inputs: dict[str, Any]) -> str:
        batch = self._prepare_inputs(inputs)
        return first_bad_module(self.learner.model, lambda: self.learner(**batch))

    def _kept(self, most: int | None = None) -> str:
        """Say which checkpoint is there, of at ``most`` that many steps."""
        last = newest_checkpoint(self._checkpoints, most=most)
        if last is not None:
            return f"{last} is kept"
        return "no checkpoint was written yet" if most is None else "no checkpoint was written before"

    def _recorded_passes(self) -> graphs.Passes:
        def run(batch: graphs.Batch) -> torch.Tensor:
            inputs = dict(batch)
            count = inputs.pop("num_items_in_batch")
            loss = self.compute_loss(self.learner, inputs, num_items_in_batch=count)
            self.accelerator.backward(loss)
            return loss.detach()

        if self._passes is None:
            recorder = CudaRecorder(self.settings.device)
            self._passes = graphs.Passes(
                run, base_of(self.learner.model), [*trainable(self.learner.model).values()], PADDING_VALUES, recorder
            )
        return self._passes

    def graph_facts(self) -> dict[str, Any]:
        """Return whether passes were recorded, why, and how many, for the record."""
        return self._graph.facts(self._passes.counts if self._passes else None)

    def frozen_facts(self) -> dict[str, Any]:
        """Return whether frozen projections were held in bfloat16, why, and how many, for the record."""
        return self._casts.facts(self._frozen.facts if self._frozen else None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write its files aside, then move them into place in one piece.

        What goes wrong on one process stops all of them with the first one's message.
        """
        optimizer: Any = self.optimizer
        self._whole = sharding.gathered((trainable(self.learner.model), optimizer.state_dict()))
        folder, problem = self._checkpoints, ""
        try:
            if processes.is_main():
                step = self.state.global_step
                notes = {"seconds": self.seconds, "losses": [*self._watch.losses.usual]}
                write_checkpoint(folder, step, notes, lambda at: self._fill(at, model, trial))
            else:  # adds its random state to what the main process writes
                self._fill(folder / STAGING, model, trial)
        except (UserError, OSError) as error:
            problem = str(error)
            if self._staging is None:  # there is not even a folder, for which the others wait
                processes.gather(problem)
        self._whole = self._staging = None
        problem = processes.gather(problem)[0]
        if problem:
            raise UserError(problem)

    def _fill(self, folder: Path, model: nn.Module, trial: Any) -> None:
        """Write this process's files of a checkpoint into ``folder``."""
        _stop_at(processes.gather(""))
        self._staging, problem = folder, ""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            problem = str(error)
        _stop_at(processes.gather(problem))
        if processes.is_main():
            (written,) = folder.iterdir()
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors only: the frozen ones are the base model's."""
        if processes.is_main() and self._whole is not None:
            folder = Path(output_dir or self._checkpoints)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().contiguous() for name, t in self._whole[0].items()}, folder / _WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what one process with the whole model would write, so that any number of processes can go on."""
        schedule: Any = self.lr_scheduler
        if processes.is_main() and self._whole is not None:
            torch.save(self._whole[1], Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        parameters = trainable(self.learner.model)
        if tensors.keys() != parameters.keys():
            raise UserError(f"{resume_from_checkpoint}: holds other tensors than this run trains; choose another --out")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(sharding.shared_out_like(tensors[name], parameter))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, values in state["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                values[key] = sharding.shared_out_like(values[key], parameters[number])
        optimizer.load_state_dict(state)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def _stop_at(problems: list[str]) -> None:
    """Raise the first of the processes' problems, if there is one."""
    if any(problems):
        raise OSError(next(filter(None, problems)))


def _arguments(settings: Settings, steps: int) -> TrainingArguments:
    if settings.device.type == "cuda" and settings.device.index:
        raise UserError(
            f"--device {settings.device}: training takes the first GPU it sees; "
            f"set CUDA_VISIBLE_DEVICES={settings.device.index}"
        )
    arguments = TrainingArguments(
        output_dir=str(settings.folder / "checkpoints"),
        use_cpu=settings.device.type == "cpu",
        max_steps=steps,
        per_device_train_batch_size=1,  # one item is one micro-batch, laid out by the plan
        gradient_accumulation_steps=settings.grad_accum,
        max_grad_norm=settings.clip,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=max(1, steps // _HISTORY_POINTS),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device.type == "cuda",
        ddp_backend="gloo" if "RANK" in os.environ and settings.device.type == "cpu" else None,
        ddp_find_unused_parameters=False,  # every one takes part, or the audit stops the run
        average_tokens_across_devices=True,
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the Trainer would spread one process over all GPUs with DataParallel
    return arguments


def _only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    (item,) = items
    return item
