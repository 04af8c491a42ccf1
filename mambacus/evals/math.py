"""Math benches: problem -> prompt -> completion -> grade -> figures."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.data import wordproblems
from mambacus.data.problems import MathProblem
from mambacus.data.prompts import ANSWER_MARK, qa_prompt
from mambacus.data.sources import WORDPROBLEM_COUNTS, load_math, math_file
from mambacus.evals.answers import UNPARSED, canonical, extract_letter, extract_number, same_number
from mambacus.evals.exemplars import program_examples, worked_examples
from mambacus.evals.expressions import canonical_expression, extract_expression, same_expression
from mambacus.evals.sandbox import Outcome
from mambacus.runtime import stats
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import read_jsonl

STYLES = ("cot", "direct", "program")
FENCE = "```"
STOPS = ("\nQuestion:", "\n\nQuestion")  # a model that starts a question of its own has finished the one it was asked
VOTE_SUBSETS = 100  # random subsets that maj@k is averaged over


@dataclasses.dataclass(frozen=True)
class Bench:
    """Which split of a math set is solved, and whether its answers are option letters or numbers.

    Attributes:
        split: one of the set's.
        letters: the answer is the letter of an option.
        source: the set (a key of `sources.MATH_SPLITS`), if it has another name than the bench.
        examples: the set whose training split gives worked examples.
        latex: answers are expressions, not just numbers.
        parts: fields of the rows by which results are also reported; the first is the items' ``group``.
    """

    split: str
    letters: bool = False
    source: str = ""
    examples: str = "gsm8k"
    latex: bool = False
    parts: tuple[str, ...] = ()


BENCHES: Mapping[str, Bench] = {
    "wordproblems": Bench("test", examples="wordproblems"),
    "wordproblems_reworded": Bench("reworded", source="wordproblems", examples="wordproblems"),
    "wordproblems_novel": Bench("novel", source="wordproblems", examples="wordproblems"),
    "gsm8k": Bench("test"),
    "svamp": Bench("test", parts=("type",)),
    "asdiv": Bench("test_numeric", parts=("type", "grade")),
    "mawps": Bench("test"),
    "gsm_hard": Bench("test"),
    "aqua": Bench("test", letters=True, examples="aqua"),
    "mathqa_gen": Bench("test", letters=True, source="mathqa", examples="aqua", parts=("category",)),
    "math": Bench("test", latex=True, examples="math", parts=("subject", "level")),
    "math500": Bench("math500", latex=True, source="math", examples="math", parts=("subject", "level")),
}


@dataclasses.dataclass(frozen=True)
class PartedProblem(MathProblem):
    """A problem of a bench with parts.

    Attributes:
        parts: the part by its name, such as ``{"subject": "Algebra", "level": "5"}``.
    """

    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """The first of the parts."""
        return next(iter(self.parts.values()), "")


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
        UserError: unknown bench (with suggestions), no data folder or file.
    """
    _check_known(name)
    source = BENCHES[name].source or name
    if source != "wordproblems":
        math_file(data_dir, source, BENCHES[name].split)


def _check_known(name: str) -> None:
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}: expected one of {', '.join(BENCHES)}{suggest(name, BENCHES)}")


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
    _check_known(name)
    problems: Sequence[MathProblem]
    source, split = BENCHES[name].source or name, BENCHES[name].split
    if source == "wordproblems":
        problems = wordproblems.generate(limit or WORDPROBLEM_COUNTS[split], split, seed)
    else:
        problems = load_math(data_dir, source, split)[:limit]
        if BENCHES[name].parts:
            problems = _with_parts(problems, math_file(data_dir, source, split), BENCHES[name].parts)
    if not problems:
        raise UserError(f"--bench {name}: no problems")
    return list(problems)


def _with_parts(problems: Sequence[MathProblem], path: Path, names: Sequence[str]) -> list[MathProblem]:
    """Return the problems with the parts that their rows name; levels of MATH come as ``Level 5`` and as ``5``."""
    rows = (row for _, row in read_jsonl(path))
    return [
        PartedProblem(
            **{field.name: getattr(problem, field.name) for field in dataclasses.fields(MathProblem)},
            parts={name: str(row.get(name, "unknown")).removeprefix("Level ") for name in names},
        )
        for problem, row in zip(problems, rows, strict=False)
    ]


def prompt(problem: MathProblem, style: str) -> str:
    """Return what the model is asked: the training prompt and, by style, how its answer begins.

    For ``direct`` that is the answer mark, for ``program`` a Python fence.
    """
    opening = {"cot": "", "direct": f" {ANSWER_MARK}", "program": f" {FENCE}python\n"}[style]
    return qa_prompt(problem.question, problem.options) + opening


def stops(style: str) -> tuple[str, ...]:
    """Return the strings that end a completion."""
    return (FENCE, *STOPS) if style == "program" else STOPS


def examples(bench: str, style: str, data_dir: Path | None, count: int) -> str:
    """Return ``count`` worked examples to stand before every prompt of a bench.

    Raises:
        UserError: no such data, or fewer examples.
    """
    if style == "program":
        return program_examples(count)
    return worked_examples(BENCHES[bench].examples, data_dir, count, direct=style == "direct")


def grade(
    problem: MathProblem, completion: str, style: str, *, latex: bool = False, outcome: Outcome | None = None
) -> Grade:
    """Extract the final answer of a completion and compare it with the problem's.

    Args:
        problem: with its gold answer.
        completion: what the model wrote.
        style: one of `STYLES`.
        latex: the answer is an expression.
        outcome: for ``program``, how the program ended; its answer is graded.
    """
    if outcome is not None:
        return _grade_program(problem, outcome, latex)
    text = ANSWER_MARK + completion if style == "direct" else completion
    if problem.options:
        found = extract_letter(text, problem.options)
        return Grade(found.text, found.text == problem.answer.strip().upper(), found.reason, found.text)
    found = extract_expression(text) if latex else extract_number(text)
    if found.text is None:
        return Grade(None, False, UNPARSED, None)
    if latex:
        return Grade(
            found.text, same_expression(problem.answer, found.text), found.reason, canonical_expression(found.text)
        )
    return Grade(found.text, same_number(problem.answer, found.text), found.reason, canonical(found.text))


def _grade_program(problem: MathProblem, outcome: Outcome, latex: bool) -> Grade:
    """Grade what a program printed or left; the reason says how it ended."""
    reason = f"program: {outcome.status}" + (f" ({outcome.detail})" if outcome.detail else "")
    if outcome.answer is None:
        return Grade(None, False, reason if outcome.status != "ok" else "program: no answer", None)
    return dataclasses.replace(grade(problem, f" {outcome.answer}", "direct", latex=latex), reason=reason)


def summarise(items: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return the figures of one bench.

    Args:
        items: one record per completion with ``id``, ``correct``, ``extracted``, ``vote``, ``finish_reason`` and
            ``tokens``; the samples of a problem share its id, every problem has equally many.
        seed: of the random subsets behind maj@k.

    Returns:
        ``n`` problems, ``correct`` completions, ``accuracy`` (share of all completions), ``wilson95`` (of ``n``
        problems: for several samples of each it is conservative), ``parse_rate``, ``truncation_rate``, ``eos_rate``,
        ``generated_tokens``; ``errors``: the number of wrong completions of each kind (see `mistakes`), where items
        name an ``error``; ``parts``: the same figures of parts, where items name ``parts``, and with them
        ``clustered95``, the interval of the accuracy if other subjects had been drawn; with several samples also their
        number, ``pass_at`` and ``maj_at`` by k.
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
    kinds = Counter(item["error"] for item in items if item.get("error"))
    if kinds:
        figures["errors"] = dict(kinds.most_common())
    if items[0].get("parts"):
        figures |= _by_part(items)
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


def _by_part(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``parts`` (name -> part -> figures of its completions) and ``clustered95`` by the first name."""
    parts: dict[str, dict[str, Any]] = {}
    for name in items[0]["parts"]:
        groups: dict[str, list[bool]] = {}
        for item in items:
            groups.setdefault(item["parts"][name], []).append(bool(item["correct"]))
        parts[name] = {
            part: {
                "n": len(right),
                "correct": sum(right),
                "accuracy": sum(right) / len(right),
                "wilson95": list(stats.wilson(sum(right), len(right))),
            }
            for part, right in sorted(groups.items())
        }
    first = next(iter(items[0]["parts"]))
    interval = stats.clustered_mean([item["correct"] for item in items], [item["parts"][first] for item in items])
    return {"parts": parts, "clustered95": [max(0.0, interval.low), min(1.0, interval.high)]}


def _majority_right(group: Sequence[Mapping[str, Any]], k: int, seed: str) -> float:
    """Return how often the majority of ``k`` of a problem's samples is right; samples without an answer do not vote."""
    chance = random.Random(seed)
    subsets = [group] if k == len(group) else [chance.sample(group, k) for _ in range(VOTE_SUBSETS)]
    # Votes of one spelling are graded alike but for rounding; where they are not, in any order, the spelling is wrong.
    verdicts: dict[str, bool] = {}
    for item in group:
        if item["vote"] is not None:
            verdicts[item["vote"]] = verdicts.get(item["vote"], True) and bool(item["correct"])
    winners = [stats.majority([item["vote"] for item in subset]) for subset in subsets]
    return sum(winner is not None and verdicts[winner] for winner in winners) / len(subsets)
