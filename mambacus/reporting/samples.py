"""Sample problems: what both models of a pair wrote, side by side, chosen by rule and not by taste."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mambacus.reporting.metrics import task_info
from mambacus.reporting.sources import Source, of_kind

PER_OUTCOME = 4
LONGEST = 900
OUTCOMES = {
    (False, True): "gained",
    (True, False): "lost",
    (True, True): "both right",
    (False, False): "both wrong",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's text: what it wrote, what was read out of it, whether that is right, why it ended."""

    label: str
    completion: str
    extracted: str
    correct: bool
    ending: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One problem with both answers; ``outcome`` is ``gained``, ``lost``, ``both right`` or ``both wrong``."""

    bench: str
    id: str
    question: str
    gold: str
    outcome: str
    before: Answer
    after: Answer


@dataclasses.dataclass(frozen=True)
class Samples:
    """The chosen problems of one pair and how many problems fall under each outcome."""

    counts: dict[str, int]
    chosen: tuple[Sample, ...]

    @property
    def changed(self) -> int:
        """How many problems only one of the two models got right."""
        return self.counts["gained"] + self.counts["lost"]


def sample_problems(sources: Sequence[Source], base: str, tuned: str) -> Samples:
    """Return the first `PER_OUTCOME` problems of every outcome and bench, in the bench's own order."""
    before, after = _answers(sources, base), _answers(sources, tuned)
    counts = dict.fromkeys(OUTCOMES.values(), 0)
    chosen: dict[tuple[str, str], list[Sample]] = {}
    for key, first in before.items():
        second = after.get(key)
        if second is None:
            continue
        outcome = OUTCOMES[bool(first["correct"]), bool(second["correct"])]
        counts[outcome] += 1
        picked = chosen.setdefault((key[0], outcome), [])
        if len(picked) < PER_OUTCOME:
            picked.append(
                Sample(
                    task_info(key[0]).title,
                    str(first["id"]),
                    str(first["question"]),
                    str(first["gold"]),
                    outcome,
                    _answer(base, first),
                    _answer(tuned, second),
                )
            )
    order = list(OUTCOMES.values())
    ranked = sorted(chosen.items(), key=lambda entry: order.index(entry[0][1]))
    return Samples(counts, tuple(sample for _, samples in ranked for sample in samples))


def identical(sources: Sequence[Source], one: str, two: str) -> tuple[int, int]:
    """Return (problems both runs solved, problems whose completions are equal to the last character)."""
    first, second = _answers(sources, one), _answers(sources, two)
    shared = [key for key in first if key in second]
    return len(shared), sum(first[key]["completion"] == second[key]["completion"] for key in shared)


def _answers(sources: Sequence[Source], label: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for source in of_kind(sources, "solve"):
        if source.label == label:
            for row in source.items:
                found.setdefault((row["bench"], str(row["id"]), row["question"]), row)
    return found


def _answer(label: str, row: dict[str, Any]) -> Answer:
    text = str(row["completion"]).strip()
    if len(text) > LONGEST:
        text = text[:LONGEST] + f" … ({len(text) - LONGEST:,} more characters in the items file)"
    extracted = row.get("extracted")
    return Answer(
        label,
        text,
        "no answer found" if extracted is None else str(extracted),
        bool(row["correct"]),
        str(row.get("finish_reason", "")),
    )
