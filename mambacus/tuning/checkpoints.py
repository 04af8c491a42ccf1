"""Training checkpoints that are whole or not there: written aside, forced to disk, then renamed into place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mambacus.runtime.errors import UserError

MARKER = "complete.json"
STAGING = ".being-written"
_NAME = re.compile(r"checkpoint-\d+")


def write_checkpoint(
    folder: Path, step: int, notes: dict[str, Any], save_into: Callable[[Path], None], *, keep: int = 2
) -> Path:
    """Write ``folder/checkpoint-<step>``; remove half-written ones and all but the newest ``keep``.

    A kill at any moment leaves either no ``checkpoint-<step>`` or a whole one, and the earlier ones untouched.

    Args:
        folder: where checkpoints live.
        step: optimiser steps done.
        notes: JSON values to find again with `read_notes`.
        save_into: writes the files into the empty folder it is given.
        keep: checkpoints that stay.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    staging, final = folder / STAGING, folder / f"checkpoint-{step}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_into(staging)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        (staging / MARKER).write_text(json.dumps({"step": step, "notes": notes, "files": files}), encoding="utf-8")
        for path in staging.iterdir():
            _force_to_disk(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        _force_to_disk(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        last = newest_checkpoint(folder)
        kept = f"the last good one is {last}" if last else "there is none yet"
        raise UserError(
            f"cannot write the checkpoint of step {step}: {' '.join(str(error).split())}; {kept}"
        ) from error
    whole = [path for path in _numbered(folder) if _is_whole(path)]
    for path in _numbered(folder):
        if path not in whole[:keep]:
            shutil.rmtree(path)
    return final


def newest_checkpoint(folder: Path, *, most: int | None = None) -> Path | None:
    """Return the newest whole checkpoint (of ``most`` steps at most), or None; half-written ones are passed over."""
    found = (path for path in _numbered(folder) if most is None or _step(path) <= most)
    return next((path for path in found if _is_whole(path)), None)


def read_notes(checkpoint: Path) -> dict[str, Any]:
    """Return the notes that `write_checkpoint` was given."""
    notes: dict[str, Any] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["notes"]
    return notes


def _numbered(folder: Path) -> list[Path]:
    """Return everything called ``checkpoint-<step>``, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """True if the marker is there and every file it lists has its size."""
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
