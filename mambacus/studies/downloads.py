"""What a study fetches from the hub besides weights: training and evaluation sets with their approximate sizes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mambacus.studies.plan import Step

# 10^6 bytes of the files that are fetched, rounded; public sizes as the data sets' pages state them, not asked for anew
DATA_SETS = {
    "microsoft/orca-math-word-problems-200k": 84.0,
    "EleutherAI/wikitext_document_level": 8.0,
    "cimec/lambada": 335.0,
    "EleutherAI/lambada_openai": 1.2,
    "allenai/ai2_arc (ARC-Easy)": 0.8,
    "allenai/ai2_arc (ARC-Challenge)": 0.5,
    "Rowan/hellaswag": 37.0,
    "nyu-mll/glue (cola)": 0.4,
    "allenai/openbookqa": 0.5,
    "regisss/math_qa": 7.0,
    "allenai/winogrande (winogrande_xl)": 2.0,
    "baber/piqa": 3.0,
    "openai/gsm8k": 3.0,
}
TASK_SETS = {  # lm_eval's task -> the data set that it reads
    "wikitext": "EleutherAI/wikitext_document_level",
    "lambada_standard": "cimec/lambada",
    "lambada_openai": "EleutherAI/lambada_openai",
    "arc_easy": "allenai/ai2_arc (ARC-Easy)",
    "arc_challenge": "allenai/ai2_arc (ARC-Challenge)",
    "hellaswag": "Rowan/hellaswag",
    "cola": "nyu-mll/glue (cola)",
    "openbookqa": "allenai/openbookqa",
    "mathqa": "regisss/math_qa",
    "winogrande": "allenai/winogrande (winogrande_xl)",
    "piqa": "baber/piqa",
    "gsm8k": "openai/gsm8k",
    "gsm8k_cot": "openai/gsm8k",
}
_PACKAGED = ("text_sample",)


def data_sets(steps: Iterable[Step]) -> dict[str, float | None]:
    """Return the data sets that steps fetch from the hub, each once, with 10^6 bytes or None where that is not known.

    Those read from a data folder, from files or from the package are none. A task that is not in the catalogue stands
    under its own name.
    """
    found: dict[str, float | None] = {}
    for step in steps:
        config = step.config
        names = []
        if step.verb == "finetune":
            name = config.data.partition(":")[0]
            names = [name] if "/" in name and not Path(config.data).expanduser().exists() else []
        elif step.verb == "evaluate" and config.data_dir is None:
            names = [TASK_SETS.get(task, f"documents of {task}") for task in config.tasks if task not in _PACKAGED]
        found |= {name: DATA_SETS.get(name) for name in names}
    return found
