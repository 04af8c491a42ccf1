"""Task names to lm_eval tasks: over local files where they are given, from the hub otherwise."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.errors import UserError, suggest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LOCAL_TASKS = Path(__file__).parent / "tasks"
PACKAGED_TASKS = ("text_sample",)  # their documents ship with the package and need no data folder


def load_tasks(names: Sequence[str], data_dir: Path | None) -> tuple[list[Any], TaskManager]:
    """Return the lm_eval tasks of ``names`` (tags and groups expand) and the task manager that knows them.

    Args:
        names: lm_eval's names.
        data_dir: read documents from the JSONL files below this folder, with no network. None: lm_eval's installed
            tasks, whose documents come from the hub.

    Raises:
        UserError: no name, an unknown name (with suggestions), a missing or broken data file, no way to the hub.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise UserError("--tasks: expected at least one task name")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise UserError(f"--tasks: {', '.join(repeated)} given more than once")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    metadata = {"data_dir": str(data_dir)} if data_dir is not None else {}
    local = TaskManager(include_path=LOCAL_TASKS, include_defaults=False, metadata=metadata)
    hub = None
    if data_dir is None and not set(names) <= set(PACKAGED_TASKS):
        hub = TaskManager()  # indexes thousands of files, so only when needed
    managers = {name: local if hub is None or name in PACKAGED_TASKS else hub for name in names}
    unknown = [name for name, manager in managers.items() if name not in manager.task_index]
    if unknown:
        known = [*local.all_tasks, *(hub.all_tasks if hub is not None else ())]
        raise UserError(_unknown(unknown, known, data_dir))
    tasks: list[Any] = []
    with quiet():
        for name, manager in managers.items():
            try:
                tasks += manager.load([name])["tasks"].values()
            except (ConnectionError, FileNotFoundError) as error:  # a data set's absence is a FileNotFoundError
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"--tasks {name}: no documents from the hub ({reason}); try --data-dir") from None
    return tasks, hub or local


def check_local_names(names: Sequence[str], data_dir: Path) -> None:
    """Check task names against those that read local files, without loading any.

    Raises:
        UserError: an unknown name (with suggestions).
    """
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=LOCAL_TASKS, include_defaults=False)
    unknown = [name for name in names if name not in local.task_index]
    if unknown:
        raise UserError(_unknown(unknown, local.all_tasks, data_dir))


def same_examples(tasks: Sequence[Any]) -> None:
    """Let every document of a task be asked with the same worked examples: the first of their split.

    lm_eval's own ``first_n`` sampler; where the examples come from the documents asked, the asked one is left out.
    """
    from lm_eval.api.samplers import FirstNSampler

    for task in tasks:
        documents = task.fewshot_docs()
        if documents is not None:
            task.sampler = FirstNSampler(list(documents))


def _unknown(names: Sequence[str], known: Sequence[str], data_dir: Path | None) -> str:
    message = f"--tasks: unknown task {', '.join(map(repr, names))}{suggest(names[0], known)}"
    if data_dir is None:
        return message
    return f"{message} (with --data-dir: {', '.join(known)}; other lm_eval tasks run without it)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what lm_eval logs, and datasets draws, for every task or model made: notes on defaults, not faults."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
