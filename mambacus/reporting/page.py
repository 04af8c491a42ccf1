"""One self-contained HTML page from records: content here; markup in ``page.html``, ``page.css``, ``page.js``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2

from mambacus import __version__
from mambacus.reporting.compare import ALPHA, Comparison, Uncompared, compare, conclusion
from mambacus.reporting.formats import reference
from mambacus.reporting.lineup import Lineup, line_up
from mambacus.reporting.panels import Panel, change_panels
from mambacus.reporting.published import NOTHING, Published, find_published
from mambacus.reporting.radar_shape import Radar, radar
from mambacus.reporting.samples import Samples, sample_problems
from mambacus.reporting.scores import Scores
from mambacus.reporting.sections import Section, sections
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.summary import Card, agreement, cards, headline, notices
from mambacus.reporting.table import Cell, Table
from mambacus.reporting.tables import comparison_table, environment_table, record_table
from mambacus.reporting.undrawn import empty_notice, mentioned, undrawn_table

COLOURS = 8
RADAR_LIMIT = 6


@dataclasses.dataclass(frozen=True)
class PairView:
    """One fine-tuning: what it gained and what it cost."""

    base: str
    tuned: str
    comparisons: tuple[Comparison, ...]
    left_out: tuple[Uncompared, ...]
    table: Table
    panels: tuple[Panel, ...]
    shown: tuple[str, ...]
    open: tuple[str, ...]
    samples: Samples


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything the page shows, before any markup."""

    title: str
    description: str
    headline: tuple[str, ...]
    notices: tuple[str, ...]
    cards: tuple[Card, ...]
    radars: tuple[Radar, ...]
    pairs: tuple[PairView, ...]
    sections: tuple[Section, ...]
    checks: tuple[str, ...]
    records: Table
    undrawn: Table
    environment: Table
    published: Published
    colours: dict[str, int]
    lineup: Lineup

    @property
    def tables(self) -> list[Table]:
        """Every table, in the page's order."""
        found = [radar.values for radar in self.radars] + [pair.table for pair in self.pairs if pair.comparisons]
        found += [table for section in self.sections for table in section.tables]
        return [*found, self.records, *([self.undrawn] if self.undrawn.rows else []), self.environment]

    def section(self, name: str) -> Section:
        """Return a section by its anchor.

        Raises:
            KeyError: the records give nothing for it.
        """
        return {section.name: section for section in self.sections}[name]


def build(
    sources: Sequence[Source],
    *,
    title: str = "",
    pairs: Sequence[str] = (),
    root: Path | None = None,
    published: bool = True,
) -> Page:
    """Compute the content of the page.

    Args:
        sources: the records.
        title: heading; by default the study's title.
        pairs: ``base=tuned`` labels; by default found in the records.
        root: folder that file names on the page are relative to.
        published: show published figures beside measured ones.
    """
    lineup = line_up(sources, pairs)
    scores = Scores(source for source in sources if source.label not in {check for _, check in lineup.checks})
    colours = _colours(lineup)
    views = tuple(_pair(sources, scores, base, tuned) for base, tuned in lineup.pairs)
    compared = [(view.base, view.tuned, view.comparisons) for view in views]
    studies = [source.record.results for source in of_kind(sources, "study")]
    printed = find_published(sources, scores) if published else NOTHING
    checks = tuple(agreement(sources, one, two) for one, two in lineup.checks)
    radars = tuple(_radars(scores, lineup, colours, printed))
    found = sections(sources, scores, lineup, colours=colours, published=printed, checks=checks)
    compared_runs = {label for _, label in lineup.checks}  # their agreement is a sentence without a number
    drawn = _drawn(radars, views, found) | {one.number for one in sources if one.label in compared_runs}
    return Page(
        title=title or next((study["title"] for study in studies), "Mambacus report"),
        description=next((study.get("description", "") for study in studies), ""),
        headline=headline(compared),
        notices=(*notices(sources, studies), *empty_notice(sources, drawn)),
        cards=cards(sources, compared),
        radars=radars,
        pairs=views,
        sections=found,
        checks=checks,
        records=record_table(sources, (root or Path.cwd()).resolve()),
        undrawn=undrawn_table(sources, drawn),
        environment=environment_table(sources),
        published=printed,
        colours=colours,
        lineup=lineup,
    )


def render(page: Page) -> str:
    """Return the page as HTML: no request to anywhere, everything inside."""
    files = resources.files("mambacus.reporting")
    names = ("page.html", "parts.html", "page.css", "page.js")
    read = {name: files.joinpath(name).read_text(encoding="utf-8") for name in names}
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader(read),
    )
    return environment.get_template("page.html").render(
        page=page, css=read["page.css"], script=read["page.js"], version=__version__, alpha=ALPHA, reference=reference
    )


def _pair(sources: Sequence[Source], scores: Scores, base: str, tuned: str) -> PairView:
    rows, left_out = compare(scores, base, tuned)
    return PairView(
        base,
        tuned,
        tuple(rows),
        tuple(left_out),
        comparison_table(rows, base, tuned, scores),
        tuple(change_panels(rows)),
        shown=tuple(conclusion(row) for row in rows if row.verdict != "open"),
        open=tuple(conclusion(row) for row in rows if row.verdict == "open"),
        samples=sample_problems(sources, base, tuned),
    )


def _drawn(radars: Sequence[Radar], views: Sequence[PairView], found: Sequence[Section]) -> set[int]:
    """Return the numbers of the records that something on the page refers to."""
    tables = [one.values for one in radars] + [view.table for view in views]
    tables += [table for section in found for table in section.tables]
    plotted = {number for section in found for figure in section.figures for number in figure.numbers}
    headings = {number for table in tables if table.rows for number in mentioned(map(Cell, table.columns))}
    return mentioned(cell for table in tables for row in table.rows for cell in row) | headings | plotted


def _colours(lineup: Lineup) -> dict[str, int]:
    """Return a colour per label, by place within its group, so that alike models look alike in every group's radar."""
    places: dict[str, int] = {}
    colours = {}
    for model in lineup.shown:
        place = places.setdefault(model.group, 0)
        colours[model.label] = place % COLOURS
        places[model.group] += 1
    return colours


def _radars(scores: Scores, lineup: Lineup, colours: dict[str, int], published: Published) -> list[Radar]:
    """Return one radar per group, else one of all models if they are few, else one per pair."""
    labels = [model.label for model in lineup.shown]
    groups = list(dict.fromkeys(model.group for model in lineup.shown if model.group))
    if groups:
        wanted = [(group, [model.label for model in lineup.shown if model.group == group]) for group in groups]
    elif len(labels) <= RADAR_LIMIT or not lineup.pairs:
        wanted = [("", labels)]
    else:
        wanted = [(f"{base} → {tuned}", [base, tuned]) for base, tuned in lineup.pairs]
    found = [radar(title, scores, members, colours, published) for title, members in wanted]
    return [one for one in found if one is not None]
