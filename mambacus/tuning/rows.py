"""Rows of a training source, one at a time: JSON lines, CSV, Parquet, or a dataset on the hub."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_jsonl

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit, 131,072, is less than a long text
NumberedRow = tuple[str, dict[str, Any]]  # where it stands, for messages; the row


def is_file_source(source: str) -> bool:
    """Return whether ``source`` means a file and not the name of a set."""
    path = Path(source).expanduser()
    return path.suffix in SUFFIXES or path.is_file()


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file; by its suffix CSV, TSV or Parquet, else JSON lines. Memory holds a few at a time.

    Raises:
        UserError: it cannot be read, or a row is broken (with its number).
    """
    if path.suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json" and _is_array(path):
        raise UserError(
            f"{path}: expected one JSON object a line, got an array; put each element on a line of a .jsonl file "
            f"(jq -c '.[]' {path.name})"
        )
    return ((f"{path}, line {number}", row) for number, row in read_jsonl(path))


def _is_array(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False  # whoever reads it says why it cannot be read


def _csv_rows(path: Path, delimiter: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) != len(names):
                raise UserError(f"{path}: a column name stands twice in the first line: {', '.join(names)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    got = len(row.get(None) or ()) + sum(value is not None for key, value in row.items() if key)
                    raise UserError(f"{where}: expected {len(names)} columns, got {got}")
                yield where, {key: value for key, value in row.items() if value != ""}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[NumberedRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())})") from None


def hub_rows(name: str) -> Iterator[NumberedRow]:
    """Yield the rows of the ``train`` split of a dataset on the hub, from its memory-mapped copy in the cache.

    Raises:
        UserError: there is no such dataset, or the hub cannot be reached.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    failures = (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError)
    try:
        configuration = ("main",) if name == "openai/gsm8k" else ()
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, *configuration, split="train")
    except failures as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--data {name}: no such file, and not to be had from the hub ({reason})") from None
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
