"""Math benches: problem -> prompt -> completion -> grade -> figures."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.data import wordproblems
from mambacus.data.problems import MathProblem
from mambacus.data.prompts import ANSWER_MARK, qa_prompt
from mambacus.data.sources import WORDPROBLEM_COUNTS, load_math, math_file
from mambacus.evals.answers import UNPARSED, canonical, extract_letter, extract_number, same_number
from mambacus.runtime import stats
from mambacus.runtime.errors import UserError, suggest

STYLES = ("cot", "direct")
STOPS = ("\nQuestion:", "\n\nQuestion")  # a model that starts a question of its own has finished the one it was asked
VOTE_SUBSETS = 100  # random subsets that maj@k is averaged over


@dataclasses.dataclass(frozen=True)
class Bench:
    """Which split of a math set is solved, and whether its answers are option letters or numbers.

    Attributes:
        split: one of the set's.
        letters: the answer is the letter of an option.
        source: the set (a key of `sources.MATH_SPLITS`), if it has another name than the bench.
    """

    split: str
    letters: bool = False
    source: str = ""


BENCHES: Mapping[str, Bench] = {
    "wordproblems": Bench("test"),
    "wordproblems_reworded": Bench("reworded", source="wordproblems"),
    "wordproblems_novel": Bench("novel", source="wordproblems"),
    "gsm8k": Bench("test"),
    "svamp": Bench("test"),
    "asdiv": Bench("test_numeric"),
    "mawps": Bench("test"),
    "gsm_hard": Bench("test"),
    "aqua": Bench("test", letters=True),
}


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    Attributes:
        extracted: the answer as the completion writes it, None if it gives none.
        correct: whether it equals the gold answer.
        reason: the rule that found it, see `mambacus.evals.answers`.
        vote: one spelling for equal answers, None if there is none.
    """

    extracted: str | None
    correct: bool
    reason: str
    vote: str | None


def check_bench(name: str, data_dir: Path | None) -> None:
    """Check that the problems of a bench, a key of `BENCHES`, are there without reading them.

    Raises:
        UserError: no data folder or file.
    """
    source = BENCHES[name].source or name
    if source != "wordproblems":
        math_file(data_dir, source, BENCHES[name].split)


def load_problems(name: str, data_dir: Path | None, limit: int | None, seed: int) -> list[MathProblem]:
    """Return the problems of a bench, in file order.

    Args:
        name: a key of `BENCHES`.
        data_dir: the folder of ``--data-dir``; ``wordproblems`` needs none.
        limit: only the first so many.
        seed: of the generated problems.

    Raises:
        UserError: unknown bench (with suggestions), no data folder or file, a broken row, or no problem at all.
    """
    if name not in BENCHES:
        raise UserError(
            f"--bench: unknown bench {name!r}: expected one of {', '.join(BENCHES)}{suggest(name, BENCHES)}"
        )
    problems: Sequence[MathProblem]
    source, split = BENCHES[name].source or name, BENCHES[name].split
    if source == "wordproblems":
        problems = wordproblems.generate(limit or WORDPROBLEM_COUNTS[split], split, seed)
    else:
        problems = load_math(data_dir, source, split)[:limit]
    if not problems:
        raise UserError(f"--bench {name}: no problems")
    return list(problems)


def prompt(problem: MathProblem, style: str) -> str:
    """Return what the model is asked: the training prompt, for ``direct`` with the answer mark already set."""
    return qa_prompt(problem.question, problem.options) + (f" {ANSWER_MARK}" if style == "direct" else "")


def grade(problem: MathProblem, completion: str, style: str) -> Grade:
    """Extract the final answer of a completion and compare it with the problem's."""
    text = ANSWER_MARK + completion if style == "direct" else completion
    if problem.options:
        found = extract_letter(text, problem.options)
        return Grade(found.text, found.text == problem.answer.strip().upper(), found.reason, found.text)
    found = extract_number(text)
    if found.text is None:
        return Grade(None, False, UNPARSED, None)
    return Grade(found.text, same_number(problem.answer, found.text), found.reason, canonical(found.text))


def summarise(items: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return the figures of one bench.

    Args:
        items: one record per completion with ``id``, ``correct``, ``extracted``, ``vote``, ``finish_reason`` and
            ``tokens``; the samples of a problem share its id, every problem has equally many.
        seed: of the random subsets behind maj@k.

    Returns:
        ``n`` problems, ``correct`` completions, ``accuracy`` (share of all completions), ``wilson95`` (of ``n``
        problems: for several samples of each it is conservative), ``parse_rate``, ``truncation_rate``, ``eos_rate``,
        ``generated_tokens``; with several samples also their number, ``pass_at`` and ``maj_at`` by k.
    """
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        problems.setdefault(item["id"], []).append(item)
    n, samples = len(problems), len(items) // len(problems)
    correct = sum(item["correct"] for item in items)
    figures: dict[str, Any] = {
        "n": n,
        "correct": correct,
        "accuracy": correct / len(items),
        "wilson95": list(stats.wilson(round(correct / samples), n)),
        "parse_rate": sum(item["extracted"] is not None for item in items) / len(items),
        "truncation_rate": sum(item["finish_reason"] == "length" for item in items) / len(items),
        "eos_rate": sum(item["finish_reason"] == "eos" for item in items) / len(items),
        "generated_tokens": sum(item["tokens"] for item in items),
    }
    if samples > 1:
        sizes = sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})
        right = [sum(item["correct"] for item in group) for group in problems.values()]
        figures["samples"] = samples
        figures["pass_at"] = {k: sum(stats.pass_at(count, samples, k) for count in right) / n for k in sizes}
        figures["maj_at"] = {
            k: sum(_majority_right(group, k, f"{seed}/{name}/{k}") for name, group in problems.items()) / n
            for k in sizes
        }
    return figures


def _majority_right(group: Sequence[Mapping[str, Any]], k: int, seed: str) -> float:
    """Return how often the majority of ``k`` of a problem's samples is right; samples without an answer do not vote."""
    chance = random.Random(seed)
    subsets = [group] if k == len(group) else [chance.sample(group, k) for _ in range(VOTE_SUBSETS)]
    verdicts = {item["vote"]: item["correct"] for item in group if item["vote"] is not None}
    winners = [stats.majority([item["vote"] for item in subset]) for subset in subsets]
    return sum(winner is not None and verdicts[winner] for winner in winners) / len(subsets)
