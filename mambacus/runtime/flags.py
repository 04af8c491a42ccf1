"""Flags that several verbs share, so that each has one help text and one default; nothing here imports torch."""

from __future__ import annotations

from typing import Any

from mambacus.runtime.config import opt


def weights_flag() -> Any:
    """Declare ``--weights``: the format that a loaded model's large matrices are quantised to, None for none."""
    return opt(
        None,
        "int8 or int4: quantise the large matrices, on a CPU; the cost in perplexity is printed",
        choices=("int8", "int4"),
    )
