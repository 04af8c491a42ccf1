"""Fine-tuning runs in processes launched together; as a script, what each of these processes does.

Launching takes seconds and a run a fraction of one, so a launch makes many runs, one after another.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]  # fields of finetune's Config, and "sabotage": a key of SABOTAGES
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(count: int, jobs: list[Job], *, sharded: bool, gpus: bool = False) -> list[str]:
    """Make the runs of ``jobs`` in ``count`` processes, as ``torchrun`` starts them; return what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= SHARDED if sharded else {}
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(jobs))
        worker.stdin.close()
        worker.stdin = None
    said = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)
    return said


def errors(out: Path, count: int) -> list[str]:
    """Return the message with which each process stopped."""
    return [out.with_name(f"{out.name}.error{rank}").read_text() for rank in range(count)]


def _attached(change: Callable[[Any], None]) -> Iterator[None]:
    """Change every model that a method has been attached to."""
    from mambacus.tuning.methods import Method

    attach = Method.attach

    def changed(self: Method, model: Any, settings: Any) -> Any:
        trained = attach(self, model, settings)
        change(model)
        return trained

    with _replaced(Method, "attach", changed):
        yield


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def _is_last() -> bool:
    return os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)


def _nan() -> Iterator[None]:
    """On the last process, the second layer gives NaN from the third step on."""
    calls = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if len(calls) > 2 else output

    def change(model: Any) -> None:
        if _is_last():
            model.backbone.layers[1].mixer.conv1d.register_forward_hook(lambda m, a, o: (spoil(m, a, o[0]), o[1]))

    yield from _attached(change)


def _spike() -> Iterator[None]:
    """On the last process, what the head reads leaps at the fifteenth step."""
    calls = []

    def leap(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return (output[0] * (1e3 if len(calls) > 14 else 1.0), *output[1:])

    def change(model: Any) -> None:
        if _is_last():
            model.backbone.norm_f.register_forward_hook(leap)

    yield from _attached(change)


def _cut() -> Iterator[None]:
    """No gradient reaches a matrix."""

    def change(model: Any) -> None:
        projection = model.backbone.layers[1].mixer.dt_proj
        projection.forward = lambda dt: dt @ projection.weight.detach().T + projection.bias

    yield from _attached(change)


def _forgotten() -> Iterator[None]:
    """The optimiser knows only the tensors with decay."""
    from mambacus.tuning import trainer

    groups = trainer.parameter_groups
    with _replaced(trainer, "parameter_groups", lambda model, decay, rate_of: groups(model, decay, rate_of)[:1]):
        yield


def _thawed() -> Iterator[None]:
    """On the last process, its part of a frozen tensor changes."""
    import torch

    from mambacus.tuning.audit import GradientAudit
    from mambacus.tuning.sharding import part

    def change(self: Any, *args: Any, **kwargs: Any) -> None:
        if _is_last():
            with torch.no_grad():
                part(next(p for name, p in self.model.named_parameters() if name.endswith("norm_f.weight"))).mul_(2)

    with _replaced(GradientAudit, "on_optimizer_step", change):
        yield


def _full() -> Iterator[None]:
    """The first process's disk is full after the first checkpoint."""
    from mambacus.tuning import trainer

    save_file = trainer.save_file

    def full(tensors: Any, path: Path) -> None:
        if any(folder.name == "checkpoint-2" for folder in path.parents[2].iterdir()):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with _replaced(trainer, "save_file", full):
        yield


def _full_elsewhere() -> Iterator[None]:
    """The last process's disk is full after the first checkpoint."""
    from mambacus.tuning.trainer import MambaTrainer

    save = MambaTrainer._save_rng_state

    def full(self: Any, output_dir: str) -> None:
        if _is_last() and self.state.global_step > 2:
            raise OSError(28, "No space left on that device")
        save(self, output_dir)

    with _replaced(MambaTrainer, "_save_rng_state", full):
        yield


SABOTAGES = {
    "nan": _nan, "spike": _spike, "cut": _cut, "forgotten": _forgotten, "thawed": _thawed, "full": _full,
    "full elsewhere": _full_elsewhere,
}  # fmt: skip


def _run(job: Job) -> None:
    import torch

    from mambacus import finetune
    from mambacus.runtime.errors import UserError

    job = dict(job)
    sabotage = job.pop("sabotage", "")
    out = Path(job["out"])
    config = finetune.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in job.items()} | {"out": out})
    with contextlib.contextmanager(SABOTAGES[sabotage])() if sabotage else contextlib.nullcontext():
        try:
            finetune.run(config)
        except UserError as error:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_name(f"{out.name}.error{os.environ['RANK']}").write_text(str(error))
    gc.collect()
    if torch.cuda.is_available():  # the next run has its own peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        _run(each)
