"""The plain sections of the page: a heading, a sentence, figures, panels and tables, drawn and exported in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mambacus.reporting.charts import Figure, training_figure
from mambacus.reporting.controlled import controlled_figures, controlled_notes, controlled_table
from mambacus.reporting.efficiency import crossover_table, efficiency_figures
from mambacus.reporting.eval_speed import eval_table
from mambacus.reporting.gpu_scripts import gpu_tables
from mambacus.reporting.lineup import Lineup
from mambacus.reporting.panels import Panel
from mambacus.reporting.prompts import prompt_table
from mambacus.reporting.published import Published
from mambacus.reporting.scores import Scores
from mambacus.reporting.scripts import script_tables
from mambacus.reporting.sources import Source
from mambacus.reporting.speed import ceiling_table, scan_figures, scan_rows, scan_table, speed_table, timings
from mambacus.reporting.sweeps import settings, sweep_notes, sweep_panels, sweep_table
from mambacus.reporting.table import Table
from mambacus.reporting.tables import merge_table, score_table, solve_table, training_table


@dataclasses.dataclass(frozen=True)
class Section:
    """One section; what is empty in it is not drawn, and a section without content is left out.

    Attributes:
        name: its anchor.
        title: its heading.
        link: its name in the page's navigation.
        about: how to read it.
        figures: plots.
        panels: bars with intervals.
        tables: tables with at least one row.
        notes: sentences under them.
    """

    name: str
    title: str
    link: str
    about: str
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    panels: tuple[Panel, ...] = ()
    notes: tuple[str, ...] = ()


def sections(
    sources: Sequence[Source],
    scores: Scores,
    lineup: Lineup,
    *,
    colours: dict[str, int],
    published: Published,
    checks: tuple[str, ...],
) -> tuple[Section, ...]:
    """Return the sections that have something to show, in the page's order."""
    labels = [model.label for model in lineup.shown]
    runs = [source for source in sources if source.record.kind in ("finetune", "pretrain")]
    losses = training_figure([(run, colours.get(run.label, place)) for place, run in enumerate(runs)])
    points, timed, scanned = settings(sources), timings(sources), scan_rows(sources)
    curves = efficiency_figures(timed)
    drawn = " Figures marked published are those of " + published.source + "; they enter no test."
    found = [
        Section(
            "solving", "Solving problems", "Solving", _SOLVING, (solve_table(sources, lineup),),
            notes=checks,
        ),
        Section(
            "scores", "All scores", "All scores", _SCORES + (drawn if published.values else ""),
            (score_table(scores, labels, published),),
        ),
        Section(
            "controlled", "The controlled study", "Controlled study", _CONTROLLED, (controlled_table(sources),),
            tuple(controlled_figures(sources)), notes=controlled_notes(sources),
        ),
        Section(
            "training", "Training", "Training", "",
            (*((training_table(sources),) if runs else ()), merge_table(sources)), (losses,) if losses else (),
        ),
        Section(
            "methods", "Methods compared", "Methods", _METHODS, (sweep_table(points),),
            panels=tuple(sweep_panels(points)), notes=sweep_notes(points),
        ),
        Section("prompts", "Prompts", "Prompts", _PROMPTS, (prompt_table(sources),)),
        Section(
            "efficiency", "Efficiency over length", "Efficiency", _EFFICIENCY if curves else "",
            (crossover_table(sources),), tuple(curves),
        ),
        Section(
            "speed", "Speed", "Speed", _SPEED if timed else "",
            (speed_table(timed), eval_table(sources), scan_table(scanned), ceiling_table(sources)),
            tuple(scan_figures(scanned)),
        ),
        Section(
            "scripts", "Measured by scripts", "Scripts", _SCRIPTS, (*gpu_tables(sources), *script_tables(sources))
        ),
    ]  # fmt: skip
    kept = [dataclasses.replace(one, tables=tuple(table for table in one.tables if table.rows)) for one in found]
    return tuple(one for one in kept if one.tables or one.figures)


_SOLVING = (
    "Each model wrote its own solution; the final number was read out of the text and compared with the known "
    "answer. “Answer found”: an answer could be read. “Cut off”: stopped by the token limit. “Ended itself”: "
    "wrote its end-of-text token. Intervals are Wilson’s."
)
_SCORES = (
    "Every metric of every task. ↑ higher is better, ↓ lower is better; the best of a row is set in bold, "
    "which says nothing about whether the difference is shown."
)
_CONTROLLED = (
    "Both sides have equal parameters, data, tokens and tuning effort; points are means over seeds, bars their"
    " 95 % intervals. The predictions were written down before the runs."
)
_METHODS = (
    "Every setting began from the same base. Points are means over seeds of the paired change in training, "
    "bars the 95 % interval over the asked items (mean of the seeds’ ends), small dots single seeds; right is "
    "better in every panel."
)
_PROMPTS = (
    "Found on training problems, then measured once on the test. Gains are paired on the same problems: "
    "bootstrap interval, exact McNemar test."
)
_EFFICIENCY = (
    "All axes are logarithmic. Dashed: replayed as a recorded graph; a cross at the upper edge: that length "
    "failed, hover names the reason. A vertical line marks the length at which two curves meet."
)
_SPEED = (
    "Medians; under each the range and the number of runs. The ratio is to the slowest implementation measured in the "
    "same record for the same case. The limit is the least time that the machine’s measured copy bandwidth and matrix "
    "speed allow for the bytes and operations of the case."
)
_SCRIPTS = "Each script is in benchmarks/; the list of records has its command."
