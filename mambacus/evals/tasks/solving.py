"""The math benches of ``mambacus solve`` as lm_eval tasks: the same prompts, stop strings and graders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import qa_completion
from mambacus.data.sources import load_math, training_split
from mambacus.evals import math

EXAMPLES = 64  # worked examples to choose from


def problems(bench: str, data_dir: str = "", **metadata: Any) -> datasets.DatasetDict:
    """Return a bench's problems as ``test`` and the first worked examples of its training set as ``train``.

    Raises:
        UserError: no ``data_dir`` where one is needed, or a missing or broken file.
    """
    folder = Path(data_dir) if data_dir else None
    examples = load_math(folder, math.BENCHES[bench].examples, training_split(math.BENCHES[bench].examples))
    worked = [problem for problem in examples if problem.solution][:EXAMPLES]
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([_row(bench, problem) for problem in worked]),
            "test": datasets.Dataset.from_list(
                [_row(bench, problem) for problem in math.load_problems(bench, folder, None, 0)]
            ),
        }
    )


def _row(bench: str, problem: MathProblem) -> dict[str, Any]:
    return {
        "bench": bench,
        "id": problem.id,
        "question": problem.question,
        "prompt": math.prompt(problem, "cot"),
        "completion": qa_completion(problem.solution, problem.answer).strip(),
        "answer": problem.answer,
        "options": list(problem.options or ()),
    }


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade one completion: ``accuracy``, and ``parsed``, whether it gives an answer at all."""
    problem = MathProblem(doc["id"], doc["question"], doc["answer"], options=tuple(doc["options"]) or None)
    verdict = math.grade(problem, results[0], "cot", latex=math.BENCHES[doc["bench"]].latex)
    return {"accuracy": float(verdict.correct), "parsed": float(verdict.extracted is not None)}
