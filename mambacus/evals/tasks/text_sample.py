"""The packaged English passages as an lm_eval task: their perplexity tells what a fine-tuning costs in language."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import datasets

from mambacus.runtime.records import read_jsonl


def passages(**metadata: Any) -> datasets.DatasetDict:
    """Return the passages as the split ``test``, the text under ``page`` as in WikiText."""
    with resources.as_file(resources.files("mambacus.data") / "text_sample" / "passages.jsonl") as path:
        rows = [{"page": row["text"], "id": row["id"]} for _, row in read_jsonl(Path(path))]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
