"""Records: each command writes one JSON document; tables, plots and reports are made from records alone.

Nothing here imports torch, so a report can be drawn on a machine without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mambacus import __version__
from mambacus.runtime.errors import UserError

SCHEMA = 1
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "lm_eval",
    "numba",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What one command did.

    Attributes:
        kind: the verb (``evaluate``, ``solve``, ``finetune``, ``bench`` ...).
        label: the name of the model under test as reports show it.
        config: the command's configuration, JSON values only.
        results: the verb's own figures; its docstring states the keys.
        environment: machine and versions, from `environment`.
        command: the command line that produced it.
        started_at: ISO 8601 time in UTC.
        seconds: wall-clock seconds.
        items_file: name of the JSONL file with item-level outputs beside the record, or None.
    """

    kind: str
    label: str
    config: dict[str, Any]
    results: dict[str, Any]
    environment: dict[str, Any]
    command: list[str]
    started_at: str
    seconds: float
    items_file: str | None = None
    schema: int = SCHEMA


class Stopwatch:
    """Starts when made; `record` closes it into a `Record`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return time.perf_counter() - self._start

    def record(
        self, kind: str, label: str, config: Any, results: dict[str, Any], *, items_file: str | None = None
    ) -> Record:
        """Return the record of the work since this stopwatch was made; ``config`` may be a dataclass."""
        plain = (
            dataclasses.asdict(config)
            if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else dict(config)
        )
        return Record(
            kind=kind,
            label=label,
            config=_jsonable(plain),
            results=_jsonable(results),
            environment=environment(),
            command=["mambacus", *sys.argv[1:]],
            started_at=self._started_at,
            seconds=round(self.seconds, 3),
            items_file=items_file,
        )


def environment() -> dict[str, Any]:
    """Return machine, operating system and package versions; names the GPU only if torch is already loaded."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "mambacus": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "gpu": gpu,
        "packages": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    isa = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{names[0] if names else platform.processor()} ({' '.join(isa)})"


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one, also after a kill.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old content is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinities become the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
    write_bytes_atomic(
        path, (json.dumps(_jsonable(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def write_jsonl_atomic(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_bytes_atomic(path, "".join(line + "\n" for line in lines).encode())


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every non-empty line.

    Raises:
        UserError: file missing, line not valid JSON or not an object; the message names file and line.
    """
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 -- closed below; a with block would hide the open's own error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object, got a {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` to ``path`` atomically."""
    write_json_atomic(path, dataclasses.asdict(record))


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: missing file, not JSON, not one of our records, or a schema this version does not know.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not a JSON file") from None
    names = {field.name for field in dataclasses.fields(Record)}
    if not isinstance(raw, dict) or not names <= set(raw):
        raise UserError(f"{path} is not a mambacus record: it needs the keys {', '.join(sorted(names))}")
    if raw["schema"] != SCHEMA:
        raise UserError(f"{path}: record schema {raw['schema']}, this version reads {SCHEMA}")
    return Record(**{name: raw[name] for name in names})


def _jsonable(value: Any) -> Any:
    """Return ``value`` with paths, tuples, dataclasses and non-finite numbers made JSON-safe."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        return _jsonable(value.item())
    return str(value)
