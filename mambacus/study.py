"""``mambacus study RECIPE.yaml --out DIR``: baseline, finetune, merge, evaluate, solve, bench, report; stage by stage.

Each step is one call of one command and leaves one record; ``--resume`` skips the steps whose records are there.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import check, opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import Record, Stopwatch, read_record

if TYPE_CHECKING:
    from mambacus.studies.plan import Plan, Step
    from mambacus.studies.recipe import Recipe

VERBS = ("finetune", "merge", "evaluate", "solve", "bench", "bench generation")
PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus study``."""

    recipe: str = opt(help="a YAML file, or the name of a packaged recipe", positional=True)
    out: Path | None = opt(None, "folder of the study (default: runs/<recipe's name>)", metavar="DIR")
    resume: bool = opt(False, "continue: steps whose records are there are skipped")
    dry_run: bool = opt(False, "print the plan with downloads, estimated time and memory; run nothing")
    models: tuple[str, ...] = opt((), "labels of the recipe to keep, or other models that stand in for them")
    limit: int = opt(0, "documents a task, problems a bench, steps a fine-tuning (0: the recipe's)", least=0)
    data_dir: Path | None = opt(None, "local data folder instead of the hub", metavar="DIR")
    device: str = opt("", "auto, cpu, cuda or cuda:N (default: the recipe's)")


def command(verb: str) -> ModuleType:
    """Return the module of a command."""
    return importlib.import_module(f"mambacus.{verb.replace(' ', '_')}")


def prepare(config: Config) -> tuple[Recipe, Plan]:
    """Read the recipe and lay out its plan; runs nothing and loads no torch.

    Raises:
        UserError: an unknown recipe, key or model, or a data folder that is not there.
    """
    from mambacus.studies.plan import Overrides, make_plan
    from mambacus.studies.recipe import choose_models, read_recipe

    check(config)
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise UserError(f"--data-dir {config.data_dir}: no such folder")
    recipe, notes = choose_models(read_recipe(config.recipe), config.models)
    out = config.out or Path("runs") / recipe.name
    overrides = Overrides(config.limit, config.data_dir, config.device)
    plan = make_plan(recipe, out, {verb: command(verb).Config for verb in VERBS}, overrides)
    return recipe, dataclasses.replace(plan, notes=(*notes, *plan.notes))


def run(config: Config) -> Record:
    """Run every step that is not done, then draw the report.

    Returns:
        The record ``study.json``: ``results`` holds ``title``, ``description``, ``models`` (label, role, base, group),
        ``steps`` (stage, verb, label, command, record, done, ``estimate`` and the ``seconds`` it took),
        ``estimated_for`` (the device) and ``substitutions`` (what differs from the recipe).

    Raises:
        UserError: a fault of a step, naming the stage and how to go on; or an ``out`` that holds another study.
    """
    from mambacus.runtime.outputs import claim_directory
    from mambacus.studies.progress import is_done, write_ledger
    from mambacus.study_estimate import as_record, estimate, seconds_text

    watch = Stopwatch()
    recipe, plan = prepare(config)
    check_inputs(recipe, plan)
    estimates, where = estimate(plan)
    guesses = {"steps": [as_record(guess) for guess in estimates], "estimated_for": where}
    claim_directory(plan.out, "study", {"recipe": recipe.name}, resume=config.resume)
    done = [is_done(step, plan.out) for step in plan.steps]  # all checked before the first long step
    ledger = write_ledger(plan, recipe, config, watch, guesses)
    say(*plan.notes)
    for number, step in enumerate(plan.steps, start=1):
        place = f"{number}/{len(plan.steps) + 1}"
        if done[number - 1]:
            say(f"{place}  {step.name}: done before")
            continue
        guess = estimates[number - 1].seconds
        say(f"\n{place}  {step.name} (estimated {'?' if guess is None else seconds_text(guess)})", style="bold")
        say(step.command, style="dim")
        run_step(step)
        ledger = write_ledger(plan, recipe, config, watch, guesses)
    say(f"\n{len(plan.steps) + 1}/{len(plan.steps) + 1}  report", style="bold")
    draw_report(plan)
    return ledger


def check_inputs(recipe: Recipe, plan: Plan) -> None:
    """Find now what would stop the study after hours: a model, device, method or data that cannot be had.

    Weights are not fetched, and tasks looked up only where a data folder names them all: the first step does the rest.

    Raises:
        UserError: naming the model or the stage.
    """
    from mambacus.evals.baselines import choose_implementation

    for entry in recipe.models:
        ours = choose_implementation(entry.source, "auto") == "mambacus"
        if entry.role == "subject" and recipe.finetune and not ours:
            raise UserError(
                f"recipe {recipe.name}: model {entry.label}: fine-tuning needs a Mamba model, {entry.source} is none; "
                "give it the role baseline"
            )
    read: set[tuple[Any, ...]] = set()
    for step in plan.steps:
        if not step.record.exists():
            try:
                _check_step(step, read)
            except UserError as error:
                raise UserError(f"stage {step.name}: {error}") from None


def _check_step(step: Step, read: set[tuple[Any, ...]]) -> None:
    """Check what `check_inputs` promises of one step; ``read`` holds the data and task names that were seen already."""
    from mambacus.evals.catalogue import check_local_names
    from mambacus.evals.math import check_bench
    from mambacus.runtime.device import resolve_device
    from mambacus.tuning.data import read_examples
    from mambacus.tuning.methods import find_method

    settings = step.config
    if hasattr(settings, "device"):
        resolve_device(settings.device)
    if step.verb == "solve":
        for bench in settings.bench:
            check_bench(bench, settings.data_dir)
    if step.verb == "evaluate" and settings.data_dir is not None and ("tasks", settings.tasks) not in read:
        check_local_names(settings.tasks, settings.data_dir)
        read.add(("tasks", settings.tasks))
    if step.verb == "bench generation":
        check_bench(settings.prompts, settings.data_dir)
    if step.verb == "finetune":
        find_method(settings.method)
        source = (settings.data, settings.data_dir, settings.seed)
        if source not in read:
            for _ in read_examples(settings.data, data_dir=settings.data_dir, seed=settings.seed):
                pass  # reading is checking
            read.add(source)


def run_step(step: Step) -> Record:
    """Run one step.

    Raises:
        UserError: the user's fault in the step, with the stage and the way on.
    """
    from mambacus.studies.progress import prepare as prepare_step

    hint = "what is finished is kept: mend the cause and add --resume"
    try:
        record: Record = command(step.verb).run(prepare_step(step))
    except UserError as error:
        raise UserError(f"stage {step.name}: {error} ({hint})") from error
    except Exception as error:
        error.add_note(f"in stage {step.name}; {hint}")
        raise
    return record


def draw_report(plan: Plan) -> Record:
    """Draw the study's page and figures from its records, replacing earlier ones."""
    from mambacus.studies.progress import LEDGER

    report = command("report")
    records = [str(plan.out / LEDGER), *(str(step.record) for step in plan.steps)]
    record: Record = report.run(
        report.Config(records=tuple(records), out=plan.out / PAGE, png=plan.out / "figures", overwrite=True)
    )
    return record


def say(*lines: str, style: str = "") -> None:
    """Print lines, in colour where the terminal has it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, style=style, markup=False)


def print_plan(recipe: Recipe, plan: Plan) -> None:
    """Print the plan: stages, the commands as one could type them, what is done, and what would be downloaded."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from mambacus.studies.downloads import data_sets

    say(f"{recipe.title}: {len(plan.steps) + 1} steps into {plan.out}", style="bold")
    say(*plan.notes)
    table = Table("#", "stage", Column("command", overflow="fold"), expand=True)
    report = f"mambacus report {plan.out} --out {plan.out / PAGE} --png {plan.out / 'figures'}"
    rows = [(step.stage, step.command, step.record.exists()) for step in plan.steps] + [("report", report, False)]
    for place, (stage, text, done) in enumerate(rows, start=1):
        table.add_row(str(place), f"{stage} (done)" if done else stage, Text(text))
    Console(highlight=False).print(table)
    hub = [entry for entry in recipe.models if "/" in entry.source and not Path(entry.source).is_dir()]
    for entry in hub:
        size = f"{entry.download_gb:.1f} GB" if entry.download_gb else "size not stated"
        say(f"downloads from the hub unless cached: {entry.source} ({size})")
    if hub:
        say(f"downloads in all: {sum(entry.download_gb for entry in hub):.1f} GB of weights")
    sets = data_sets(plan.steps)
    for name, megabytes in sets.items():
        say(f"data from the hub unless cached: {name} ({_megabytes(megabytes)})")
    if sets:
        known = sum(megabytes or 0.0 for megabytes in sets.values())
        unknown = sum(megabytes is None for megabytes in sets.values())
        more = f" and {unknown} of unknown size" if unknown else ""
        total = f"about {known / 1000:.2f} GB{more}"
        say(f"data in all: {total}; sizes are approximate; with --data-dir DIR from local files")


def _megabytes(value: float | None) -> str:
    return "size not known" if value is None else f"about {value:g} MB"


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print the outcome."""
    config = parse(Config, argv, "mambacus study", (__doc__ or "").splitlines()[0])
    if config.dry_run:
        from mambacus.study_estimate import estimate, print_estimates

        recipe, plan = prepare(config)
        print_plan(recipe, plan)
        print_estimates(plan, *estimate(plan))
        return
    run(config)
    print_summary(config.out or Path("runs") / Path(config.recipe).stem)


def print_summary(out: Path) -> None:
    """Print what a finished study found: paired comparisons, checks, speed, and where the page lies."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mambacus.reporting.tables import speed_lines, summary_rows

    found = read_record((out / PAGE).with_suffix(".json")).results
    rows = summary_rows(found["comparisons"])
    for model in dict.fromkeys(row[1] for row in rows):
        table = Table(title=model, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("task")
        for heading in ("before", "after", "change, 95 %", "p, Holm"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for task, tuned, *figures in rows:
            if tuned == model:
                table.add_row(task, *figures)
        Console(highlight=False).print(table)
    say(*found["checks"], *speed_lines(out / source for source in found["sources"]), *found["notices"])
    say(f"page: {out / PAGE}", style="bold")
