"""``mambacus controlled``: Mamba against a Transformer of equal size, data and tuning, predictions written down first.

Every run leaves a file, and the record is written anew after each, so a study that was cut off continues at the next
run with ``--resume``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.records import Record, Stopwatch, read_json, write_json_atomic, write_record

if TYPE_CHECKING:
    from mambacus.synthetic.arms import Arm
    from mambacus.synthetic.recipe import Recipe
    from mambacus.synthetic.runs import Laboratory, Run

RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus controlled``."""

    recipe: str = opt(help="a YAML file, or phonebook, mqar, addition, wordproblems", positional=True)
    out: Path | None = opt(None, "folder of the study (default: runs/controlled-<recipe's name>)", metavar="DIR")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    resume: bool = opt(False, "continue: runs whose files are there are not made again")
    limit_steps: int = opt(0, "no more steps a run than this, to try a recipe (0: the recipe's)", least=0)
    dry_run: bool = opt(False, "print predictions, sizes and the budget, and run nothing")


def prepare(config: Config) -> tuple[Recipe, tuple[Arm, ...]]:
    """Read the recipe and size the arms.

    Raises:
        UserError: no such recipe, a fault in it, or sizes that cannot be met.
    """
    from mambacus.synthetic.recipe import read_recipe
    from mambacus.synthetic.runs import arms_of, limited

    recipe = limited(read_recipe(config.recipe), config.limit_steps)
    return recipe, arms_of(recipe.arms)


def run(config: Config) -> Record:
    """Carry out every run that is not there yet, and leave ``runs/*.json`` and ``record.json`` in ``--out``.

    ``results``: ``predictions`` (of the recipe), ``rows`` (one run at one difficulty), ``summary`` (mean and interval
    over seeds), ``verdicts`` (``held``: true, false or ``"open"``), ``tuning`` (every rate tried), ``notes``,
    ``curves`` (training losses), ``runs`` (planned and finished); `mambacus.synthetic.verdicts` states the keys.

    Raises:
        UserError: a fault of the recipe, a device that is not there, or an ``out`` that holds another study.
    """
    from mambacus.runtime.device import resolve_device
    from mambacus.runtime.outputs import claim_directory
    from mambacus.synthetic.runs import Laboratory, count_runs
    from mambacus.synthetic.verdicts import results

    watch = Stopwatch()
    recipe, arms = prepare(config)
    device = resolve_device(config.device)
    out = config.out or Path("runs") / f"controlled-{recipe.name}"
    identity = {"recipe": recipe.loaded, "limit_steps": config.limit_steps, "device": device.type}
    claim_directory(out, "controlled", identity, resume=config.resume)
    planned = count_runs(recipe, arms)
    finished: list[dict[str, Any]] = []
    for found in _carry_out(Laboratory(recipe, device), recipe, arms, out):
        finished.append(found)
        print(f"{len(finished)}/{planned}  {_in_words(found)}", flush=True)
        record = watch.record("controlled", recipe.name, config, results(recipe, finished, planned))
        write_record(out / RECORD, record)
    return record


def _carry_out(laboratory: Laboratory, recipe: Recipe, arms: tuple[Arm, ...], out: Path) -> Iterator[dict[str, Any]]:
    """Yield what each run found, tuning before seeds, task by task."""
    from mambacus.synthetic.runs import seed_runs, tuning_runs

    for entry in recipe.tasks:
        tuned = []
        for one in tuning_runs(entry, arms):
            tuned.append(_found(one, laboratory, out))
            yield tuned[-1]
        for one in seed_runs(entry, arms, tuned):
            yield _found(one, laboratory, out)


def _found(one: Run, laboratory: Laboratory, out: Path) -> dict[str, Any]:
    """Return what a run found, from its file if it is there."""
    path = out / "runs" / f"{one.name}.json"
    if not path.exists():
        write_json_atomic(path, laboratory.carry_out(one))
    return read_json(path)


def _in_words(found: dict[str, Any]) -> str:
    who = f"{found['task']}  {found['key']}  rate {found['learning_rate']:g}"
    if found["tuning"]:
        outcome = f"tuning  validation loss {float(found['valid_loss']):.4f}, right {found['valid_accuracy']:.1%}"
    else:
        right = ", ".join(f"{tested['x']}: {tested['accuracy']:.1%}" for tested in found["test"])
        outcome = f"seed {found['seed']}  right at {right}"
    diverged = "  DIVERGED" if found["diverged"] else ""
    return f"{who}  {outcome}  ({found['seconds']:.0f} s){diverged}"


def budget(recipe: Recipe, arms: tuple[Arm, ...]) -> list[dict[str, Any]]:
    """Return for each task and arm the rows, tokens and floating-point operations of one run and of all its runs."""
    from mambacus.synthetic.runs import mean_seqlen, scored_share, seqlen_of, tokens_of_step

    lines = []
    for entry in recipe.tasks:
        settings, seqlen, scored = entry.training, seqlen_of(entry), scored_share(entry)
        runs = len(settings.learning_rates) + settings.seeds
        for arm in arms:
            tokens = settings.steps * tokens_of_step(entry)
            flops = tokens * arm.flops_per_token(mean_seqlen(entry), entry.task.vocab_size, scored)
            lines.append(
                {
                    "task": entry.name, "arm": arm, "steps": settings.steps, "batch": settings.batch,
                    "seqlen": seqlen, "tokens": tokens, "runs": runs, "all_tokens": tokens * runs,
                    "flops": flops * runs,
                }
            )  # fmt: skip
    return lines


def print_plan(recipe: Recipe, arms: tuple[Arm, ...]) -> None:
    """Print question, predictions, sizes and budget."""
    print(f"{recipe.title}\n{recipe.question}\n\npredictions, written down before any run:")
    for prediction in recipe.predictions:
        print(f"  {prediction.task}: {prediction.text} ({prediction.expects})")
    print(f"\n{'arm':<14}{'layers':>7}{'width':>7}{'parameters':>12}  (without embeddings)")
    for arm in arms:
        print(f"{arm.key:<14}{arm.layers:>7}{arm.width:>7}{arm.parameters:>12,}")
    lines = budget(recipe, arms)
    heads = f"{'runs':>5}{'steps':>7}{'batch':>6}{'seqlen':>7}{'M tokens a run':>15}{'PFLOP in all':>13}"
    print(f"\n{'task':<20}{'arm':<14}{heads}")
    for line in lines:
        print(
            f"{line['task']:<20}{line['arm'].key:<14}{line['runs']:>5}{line['steps']:>7}{line['batch']:>6}"
            f"{line['seqlen']:>7}{line['tokens'] / 1e6:>15.1f}{line['flops'] / 1e15:>13.2f}"
        )
    tokens, flops = (sum(line[key] for line in lines) for key in ("all_tokens", "flops"))
    print(
        f"\nin all: {sum(line['runs'] for line in lines)} runs, {tokens / 1e6:,.0f} M tokens, {flops / 1e15:.2f} PFLOP"
    )


def print_outcome(record: Record, out: Path) -> None:
    """Print accuracies, verdicts and where the record lies."""
    found = record.results
    print(f"\n{'task':<20}{'arm':<18}{'x':>6}  right, 95 % over seeds")
    for line in found["summary"]:
        arm = line["arm"] if line["d_state"] is None else f"{line['arm']} (N {line['d_state']})"
        interval = "" if line["low95"] is None else f"  [{line['low95']:.1%}, {line['high95']:.1%}]"
        print(f"{line['task']:<20}{arm:<18}{line['x']:>6}  {line['mean']:.1%}{interval}")
    for line in found["verdicts"]:
        print(f"\npredicted: {line['prediction']}\n{line['text']}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"\nrecord: {out / RECORD}  (mambacus report {out} --out {out / 'report.html'})")


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome."""
    config = parse(Config, argv, "mambacus controlled", (__doc__ or "").splitlines()[0])
    if config.dry_run:
        print_plan(*prepare(config))
        return
    record = run(config)
    print_outcome(record, config.out or Path("runs") / f"controlled-{record.label}")
