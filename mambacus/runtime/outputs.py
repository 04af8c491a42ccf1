"""Output folders: never overwrite another run, and know one's own when resuming."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_json, write_json_atomic

RUN_FILE = "run.json"


def fingerprint(values: Any) -> str:
    """Return a 16-digit hash of JSON-like ``values``; equal values give equal hashes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def claim_directory(path: Path, kind: str, identity: dict[str, Any], *, resume: bool) -> None:
    """Make ``path`` this run's folder.

    An empty or new folder is claimed by writing ``run.json``. With ``resume`` a folder claimed by an equal ``identity``
    (the settings that decide the result) is taken again.

    Raises:
        UserError: ``path`` is a file, holds files that are not a run's, holds another run, or holds this run and
            ``resume`` is off.
    """
    check_writable(path)
    marker = path / RUN_FILE
    mine = {"kind": kind, "identity": json.loads(json.dumps(identity, default=str))}
    if marker.exists():
        theirs = read_json(marker)
        if theirs.get("kind") != kind:
            raise UserError(f"--out {path}: holds a run of another kind; choose another folder")
        if theirs.get("identity") != mine["identity"]:
            old = theirs.get("identity") or {}
            changed = sorted(key for key in {*old, *mine["identity"]} if old.get(key) != mine["identity"].get(key))
            raise UserError(f"--out {path}: holds another run (differs in {', '.join(changed)}); choose another folder")
        if not resume:
            raise UserError(
                f"--out {path}: holds this run already; add --resume to continue it or choose another folder"
            )
        return
    if path.exists() and any(path.iterdir()):
        raise UserError(f"--out {path}: holds files that are not a mambacus run; choose an empty or new folder")
    write_json_atomic(marker, mine)


def claim_empty(path: Path) -> None:
    """Make sure, before long work, that ``path`` can become a folder of ours.

    Raises:
        UserError: it holds anything, is a file, or cannot be written.
    """
    check_writable(path)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"--out {path}: expected a new or empty folder, this one holds files; choose another")


def claim_file(path: Path, *, overwrite: bool, flag: str = "--out", items: bool = True) -> None:
    """Make sure, before long work, that a file, and a record's items beside it, can be written to ``path``.

    Args:
        path: the file.
        overwrite: it may exist.
        flag: where the user named it.
        items: it is a record, beside which items may stand; off for other files.

    Raises:
        UserError: ``path`` is a folder or cannot be written, or it or its items exist and ``overwrite`` is off.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: expected a file, got a folder")
    for existing in (path, items_path(path)) if items else (path,):
        if existing.exists() and not overwrite:
            raise UserError(f"{flag} {existing}: exists already; add --overwrite to replace it or choose another name")
    check_writable(path.parent, flag)


def check_writable(folder: Path, flag: str = "--out") -> None:
    """Make sure that files can be made in ``folder``, which need not exist yet; nothing is left behind.

    Raises:
        UserError: it or a part of its path is a file, or it cannot be written.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        what = "expected a folder, got a file" if nearest == folder else f"{nearest} is a file, not a folder"
        raise UserError(f"{flag} {folder}: {what}")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{flag} {folder}: cannot write to {nearest}: {reason}") from None


def items_path(record: Path) -> Path:
    """Return the JSONL file with the item-level outputs of a record: beside it, named after it."""
    return record.with_name(f"{record.stem}.items.jsonl")
