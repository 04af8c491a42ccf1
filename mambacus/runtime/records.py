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
            command=[*_program(sys.argv[0]), *sys.argv[1:]],
            started_at=self._started_at,
            seconds=round(self.seconds, 3),
            items_file=items_file,
        )


def _program(started_as: str) -> list[str]:
    """Return how to start this program again: ``mambacus``, or a script by its path from the current folder."""
    if started_as in ("", "-c"):  # no file: Python's prompt, or code on the command line
        return ["python", *([started_as] if started_as else [])]
    path = Path(os.path.abspath(started_as))
    if path.stem == "mambacus" or path.parts[-2:] == ("mambacus", "__main__.py"):
        return ["mambacus"]
    below = path.is_relative_to(Path.cwd())
    return ["python", path.relative_to(Path.cwd()).as_posix() if below else path.name]


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
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    try:
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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, nested without end
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {_json_type(value)}")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every non-empty line.

    Raises:
        UserError: file missing, line not valid JSON or not an object; the message names file and line.
    """
    try:
        file = open(path, encoding="utf-8-sig")  # noqa: SIM115 -- closed below; a with block would hide open's own error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_line(line, f"{path}, line {number}")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; expected one JSON object a line, saved as UTF-8") from None


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object on one line.

    Raises:
        UserError: it is not valid JSON or not an object; the message begins with ``where``.
    """
    try:
        row = _STRICT.decode(line.strip())
    except json.JSONDecodeError as error:
        hint = "; expected one object a line, not one array" if line.lstrip().startswith("[") else ""
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise UserError(f"{where}: not valid JSON ({reason})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {_json_type(row)}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)  # Python's own takes NaN and Infinity


def _json_type(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` to ``path`` atomically."""
    write_json_atomic(path, dataclasses.asdict(record))


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: missing file, not JSON, not one of our records, or a schema this version does not know.
    """
    raw = read_json(path)
    names = {field.name for field in dataclasses.fields(Record)}
    if not names <= set(raw):
        raise UserError(f"{path} is not a mambacus record: it needs the keys {', '.join(sorted(names))}")
    if raw["schema"] != SCHEMA:
        raise UserError(f"{path}: record schema {raw['schema']}, this version reads {SCHEMA}")
    for name, kind in (("kind", str), ("label", str), ("config", dict), ("results", dict), ("environment", dict)):
        if not isinstance(raw[name], kind):
            raise UserError(f"{path}: {name}: expected a {kind.__name__}, got {_json_type(raw[name])}")
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
