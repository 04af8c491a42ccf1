"""From finished runs to what a report draws: rows, means over seeds with intervals, and whether predictions held.

Needs no torch. Intervals are Student's t over seeds at 95 %: three seeds have two degrees of freedom and a factor of
4.3 on the standard error, so a small difference stays undecided. A comparison is paired by seed, which both arms share
together with its order of training rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mambacus.runtime.stats import Interval, clustered_mean
from mambacus.synthetic.recipe import Prediction, Recipe

Row = Mapping[str, Any]


def results(recipe: Recipe, runs: Sequence[Row], planned: int) -> dict[str, Any]:
    """Return the ``results`` of a record of kind ``controlled`` from the runs that are finished.

    Args:
        recipe: the study.
        runs: what `mambacus.synthetic.runs.Laboratory.carry_out` gave, in the order of the plan.
        planned: runs of the whole study.
    """
    rows = [row for run in runs if not run["tuning"] for row in _rows(run, recipe)]
    tuning = _tuning(runs)
    return {
        "title": recipe.title,
        "question": recipe.question,
        "sources": recipe.sources,
        "predictions": [dataclasses.asdict(prediction) for prediction in recipe.predictions],
        "rows": rows,
        "summary": summary(rows),
        "verdicts": [verdict(prediction, rows) for prediction in recipe.predictions],
        "tuning": tuning,
        "notes": _notes(tuning),
        "curves": [
            {**_who(run), "seed": run["seed"], "loss": run["curve"]} for run in runs if not run["tuning"]
        ],
        "interval": "Student's t over seeds, 95 %; shares are cut to 0 and 1",
        "runs": {"planned": planned, "finished": len(runs)},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }  # fmt: skip


def _who(run: Row) -> dict[str, Any]:
    return {key: run[key] for key in ("task", "arm", "d_state")}


def _rows(run: Row, recipe: Recipe) -> Iterable[dict[str, Any]]:
    shared = {
        **_who(run),
        **{key: run[key] for key in ("parameters", "parameters_embedded", "width", "layers", "learning_rate", "seed")},
    }
    for tested in run["test"]:
        yield {
            **shared,
            "x": tested["x"],
            "x_name": recipe.entry(run["task"]).task.x_name,
            "trained_x": recipe.entry(run["task"]).train_x,
            **{key: tested[key] for key in ("accuracy", "token_accuracy", "n", "memory_numbers")},
            **{key: run[key] for key in ("train_tokens", "steps", "seconds", "diverged")},
        }


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return mean accuracy and interval over seeds for each task, arm and ``x``; no interval from one seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["arm"], row["d_state"], row["x"]), []).append(row)
    found = []
    for (task, arm, d_state, x), same in groups.items():
        interval = clustered_mean([row["accuracy"] for row in same], range(len(same)))
        several = len(same) > 1
        found.append(
            {
                "task": task,
                "arm": arm,
                "d_state": d_state,
                "x": x,
                "x_name": same[0]["x_name"],
                "mean": interval.estimate,
                "low95": max(0.0, interval.low) if several else None,
                "high95": min(1.0, interval.high) if several else None,
                "seeds": len(same),
            }
        )
    return found


def verdict(prediction: Prediction, rows: Sequence[Row]) -> dict[str, Any]:
    """Return whether a prediction held, as far as the rows decide it.

    ``held``: True if the whole interval of the difference lies on the predicted side of 0, False if none of it does,
    ``"open"`` if it includes both, if nothing was predicted, or if runs are missing.
    """
    mine = _means(rows, prediction.task, "mamba", prediction.d_state, prediction.x)
    other = "transformer" if prediction.against_d_state is None else "mamba"
    theirs = _means(rows, prediction.against_task, other, prediction.against_d_state, prediction.x)
    seeds = sorted(mine.keys() & theirs.keys())
    shared = {"task": prediction.task, "prediction": prediction.text, "expects": prediction.expects}
    if not seeds:
        return {**shared, "held": "open", "text": "not run yet"}
    difference = clustered_mean([mine[seed] - theirs[seed] for seed in seeds], seeds)
    held = judge(prediction.expects, difference, len(seeds))
    if held == "open":
        outcome = "nothing was predicted" if prediction.expects == "open" else "undecided"
    else:
        outcome = "as predicted" if held else "not as predicted"
    text = f"{_sides(prediction)}: {_points(difference, len(seeds))}; {outcome}"
    return {
        **shared,
        "held": held,
        "text": text,
        "difference": difference.estimate,
        "low95": difference.low if len(seeds) > 1 else None,
        "high95": difference.high if len(seeds) > 1 else None,
        "seeds": len(seeds),
    }


def judge(expects: str, difference: Interval, seeds: int) -> bool | str:
    """Return ``held`` of `verdict` for the difference of accuracies, Mamba's minus the other's."""
    if expects == "open" or seeds < 2:
        return "open"
    sign = -1 if expects == "mamba_lower" else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    if low > 0:
        return True
    return False if high <= 0 else "open"


def _means(rows: Sequence[Row], task: str, arm: str, d_state: int | None, xs: Sequence[int]) -> dict[int, float]:
    """Return seed -> mean accuracy over ``xs``, for the seeds that have them all."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        if (row["task"], row["arm"], row["d_state"]) == (task, arm, d_state) and row["x"] in xs:
            found.setdefault(row["seed"], {})[row["x"]] = row["accuracy"]
    return {seed: sum(by_x.values()) / len(xs) for seed, by_x in found.items() if len(by_x) == len(xs)}


def _sides(prediction: Prediction) -> str:
    other = "Transformer" if prediction.against_d_state is None else f"Mamba (d_state {prediction.against_d_state})"
    if prediction.against_task != prediction.task:
        other += f" on {prediction.against_task}"
    return f"Mamba (d_state {prediction.d_state}) minus {other} at {', '.join(map(str, prediction.x))}"


def _points(difference: Interval, seeds: int) -> str:
    text = f"{100 * difference.estimate:+.1f} points"
    if seeds < 2:
        return f"{text}, one seed"
    return f"{text} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}], {seeds} seeds"


def _tuning(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Return every rate tried, with the one that was chosen where all of an arm's are finished."""
    keys = ("learning_rate", "seed", "valid_loss", "valid_accuracy", "steps", "train_tokens", "seconds", "diverged")
    used = {(run["task"], run["arm"], run["d_state"], run["learning_rate"]) for run in runs if not run["tuning"]}
    return [
        {**_who(run), **{key: run[key] for key in keys}, "chosen": (*_who(run).values(), run["learning_rate"]) in used}
        for run in runs
        if run["tuning"]
    ]


def _notes(tuning: Sequence[Row]) -> list[str]:
    """Return a sentence for each chosen rate at the end of the grid, beyond which a better one may lie."""
    notes = []
    for row in tuning:
        rates = [other["learning_rate"] for other in tuning if _who(other) == _who(row)]
        if row["chosen"] and len(rates) > 1 and row["learning_rate"] in (min(rates), max(rates)):
            end = "smallest" if row["learning_rate"] == min(rates) else "largest"
            name = row["arm"] if row["d_state"] is None else f"{row['arm']} (d_state {row['d_state']})"
            notes.append(f"{row['task']}, {name}: the chosen rate {row['learning_rate']:g} is the {end} tried")
    return notes
