"""Rows of the local JSONL files as the documents that lm_eval's task definitions expect.

Each function is a task's ``custom_dataset``: lm_eval calls it with the task manager's metadata (``data_dir``) and the
YAML's ``dataset_kwargs`` (``files``, ``columns``). Reading is in memory: no network and no dataset cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_jsonl

Row = dict[str, Any]


def plain(files: Mapping[str, str], columns: list[str], data_dir: str = "", **metadata: Any) -> datasets.DatasetDict:
    """Return the splits in ``files`` (split name: path below ``data_dir``), keeping ``columns``.

    Raises:
        UserError: no ``data_dir``, a missing or broken file, a row without one of the columns, or a file without rows.
    """
    return _splits(data_dir, files, columns, lambda row: row)


def gsm8k(files: Mapping[str, str], columns: list[str], data_dir: str = "", **metadata: Any) -> datasets.DatasetDict:
    """Return GSM8K with ``answer`` in the published form: the solution with its calculator marks, then ``#### N``."""

    def published(row: Row) -> Row:
        return {"question": row["question"], "answer": f"{row['solution_annotated']}\n#### {row['answer']}"}

    return _splits(data_dir, files, columns, published)


def gsm8k_cot_samples() -> list[Row]:
    """Return the eight worked examples of Wei et al. 2022, as the installed lm_eval words them."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml")
    samples: list[Row] = definition["fewshot_config"]["samples"]
    return samples


def piqa(files: Mapping[str, str], columns: list[str], data_dir: str = "", **metadata: Any) -> datasets.DatasetDict:
    r"""Return PIQA with the published fields, from rows whose query reads ``Question: <goal>\n``."""

    def published(row: Row) -> Row:
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}

    return _splits(data_dir, files, columns, published)


def _splits(
    data_dir: str, files: Mapping[str, str], columns: list[str], published: Callable[[Row], Row]
) -> datasets.DatasetDict:
    if not data_dir:
        raise UserError("these tasks read local files: give the folder as --data-dir (lm_eval: --metadata data_dir)")
    return datasets.DatasetDict(
        {split: _read(Path(data_dir) / name, columns, published) for split, name in files.items()}
    )


def _read(path: Path, columns: list[str], published: Callable[[Row], Row]) -> datasets.Dataset:
    rows = []
    for number, row in read_jsonl(path):
        missing = [column for column in columns if column not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no {', '.join(missing)}; the row has {', '.join(row)}")
        rows.append(published({column: row[column] for column in columns}))
    if not rows:
        raise UserError(f"{path}: no rows")
    return datasets.Dataset.from_list(rows)
