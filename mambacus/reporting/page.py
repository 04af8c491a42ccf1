"""One self-contained HTML page from records: content here; markup in ``page.html``, ``page.css``, ``page.js``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mambacus import __version__
from mambacus.reporting.compare import ALPHA, Comparison, Uncompared, compare, conclusion
from mambacus.reporting.formats import duration, percent, rate, show
from mambacus.reporting.lineup import Lineup, line_up
from mambacus.reporting.metrics import task_info
from mambacus.reporting.plots import Chart, Panel, Radar, change_panels, change_text, radar, training_chart
from mambacus.reporting.samples import Samples, identical, sample_problems
from mambacus.reporting.scores import Scores
from mambacus.reporting.sources import Source, of_kind
from mambacus.reporting.tables import (
    Table,
    comparison_table,
    environment_table,
    merge_table,
    record_table,
    score_table,
    solve_table,
    speed_table,
    training_table,
)

COLOURS = 8
RADAR_LIMIT = 6


@dataclasses.dataclass(frozen=True)
class Card:
    """A key figure: what, the figure, and one line under it."""

    title: str
    figure: str
    note: str
    style: str = ""


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
    headline: str
    notices: tuple[str, ...]
    cards: tuple[Card, ...]
    radars: tuple[Radar, ...]
    pairs: tuple[PairView, ...]
    scores: Table
    solving: Table
    speed: Table
    training: Table
    chart: Chart | None
    merges: Table
    checks: tuple[str, ...]
    records: Table
    environment: Table
    colours: dict[str, int]
    lineup: Lineup


def build(sources: Sequence[Source], *, title: str = "", pairs: Sequence[str] = (), root: Path | None = None) -> Page:
    """Compute the content of the page.

    Args:
        sources: the records.
        title: heading; by default the study's title.
        pairs: ``base=tuned`` labels; by default found in the records.
        root: folder that file names on the page are relative to.
    """
    lineup = line_up(sources, pairs)
    scores = Scores(source for source in sources if source.label not in {check for _, check in lineup.checks})
    labels = [model.label for model in lineup.shown]
    colours = {label: place % COLOURS for place, label in enumerate(labels)}
    views = tuple(_pair(sources, scores, base, tuned) for base, tuned in lineup.pairs)
    studies = [source.record.results for source in of_kind(sources, "study")]
    runs = [source for source in sources if source.record.kind in ("finetune", "pretrain")]
    return Page(
        title=title or next((study["title"] for study in studies), "Mambacus report"),
        description=next((study.get("description", "") for study in studies), ""),
        headline=_headline(views),
        notices=tuple(_notices(sources, studies)),
        cards=tuple(_cards(sources, views)),
        radars=tuple(_radars(scores, lineup, colours)),
        pairs=views,
        scores=score_table(scores, labels),
        solving=solve_table(sources, lineup),
        speed=speed_table(sources),
        training=training_table(sources),
        chart=training_chart([(run, colours.get(run.label, place)) for place, run in enumerate(runs)]),
        merges=merge_table(sources),
        checks=tuple(_check(sources, one, two) for one, two in lineup.checks),
        records=record_table(sources, (root or Path.cwd()).resolve()),
        environment=environment_table(sources),
        colours=colours,
        lineup=lineup,
    )


def render(page: Page) -> str:
    """Return the page as HTML: no request to anywhere, everything inside."""
    files = resources.files("mambacus.reporting")
    read = {name: files.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader(read),
    )
    return environment.get_template("page.html").render(
        page=page, css=read["page.css"], script=read["page.js"], version=__version__, alpha=ALPHA, show=show
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


def _headline(views: Sequence[PairView]) -> str:
    """Return one sentence per pair: the largest shown gain in mathematics and what language modelling paid for it."""
    sentences = []
    for view in views:
        gain, cost = _gain(view), _cost(view)
        parts = []
        if gain is not None:
            span = f"{show(gain.metric, gain.before)}", f"{show(gain.metric, gain.after)}"
            verb = {
                "better": "rose from {} to {}",
                "worse": "fell from {} to {}",
                "open": "shows no difference ({} → {})",
            }
            parts.append(f"accuracy on {task_info(gain.task).title} {verb[gain.verdict].format(*span)}")
        if cost is not None:
            size = change_text(cost)
            verb = {"better": "fell by {}", "worse": "rose by {}", "open": "shows no difference ({})"}
            text = verb[cost.verdict].format(size if cost.verdict == "open" else size.lstrip("+−"))
            parts.append(f"perplexity on {task_info(cost.task).title} {text}")
        if parts:
            text = " and ".join(parts)
            sentences.append(f"{view.base} → {view.tuned}: {text}.")
    return " ".join(sentences)


def _gain(view: PairView) -> Comparison | None:
    rows = [row for row in view.comparisons if task_info(row.task).family == "math" and row.kind == "share"]
    return max(rows, key=lambda row: (row.verdict != "open", abs(row.change)), default=None)


def _cost(view: PairView) -> Comparison | None:
    return next((row for row in view.comparisons if row.kind == "perplexity"), None)


def _cards(sources: Sequence[Source], views: Sequence[PairView]) -> list[Card]:
    cards = []
    for view in views[:3]:
        suffix = f" · {view.tuned}" if len(views) > 1 else ""
        if (gain := _gain(view)) is not None:
            figure = f"{show(gain.metric, gain.before)} → {show(gain.metric, gain.after)}"
            note = f"{change_text(gain)} on {gain.n:,} problems{suffix}"
            cards.append(Card(task_info(gain.task).title, figure, note, gain.verdict))
        if (cost := _cost(view)) is not None:
            span = f"{show(cost.metric, cost.before)} → {show(cost.metric, cost.after)}"
            note = f"{span} on {task_info(cost.task).title}{suffix}"
            cards.append(Card("Perplexity, the cost", change_text(cost), note, cost.verdict))
    trained = of_kind(sources, "finetune")
    if trained:
        results = trained[0].record.results
        train, parameters = results["train"], results.get("parameters", {})
        note = f"{trained[0].label}, {rate(train.get('tokens_per_second'))} tokens/s"
        if parameters.get("trainable") and parameters.get("total"):
            note += f", {percent(parameters['trainable'] / parameters['total'])} of the parameters"
        cards.append(Card("Fine-tuning", duration(train.get("seconds")), note))
    return cards


def _radars(scores: Scores, lineup: Lineup, colours: dict[str, int]) -> list[Radar]:
    """Return one radar per group, else one of all models if they are few, else one per pair."""
    labels = [model.label for model in lineup.shown]
    groups = list(dict.fromkeys(model.group for model in lineup.shown if model.group))
    if groups:
        wanted = [(group, [model.label for model in lineup.shown if model.group == group]) for group in groups]
    elif len(labels) <= RADAR_LIMIT or not lineup.pairs:
        wanted = [("", labels)]
    else:
        wanted = [(f"{base} → {tuned}", [base, tuned]) for base, tuned in lineup.pairs]
    found = [radar(title, scores, members, colours) for title, members in wanted]
    return [one for one in found if one is not None]


def _notices(sources: Sequence[Source], studies: Sequence[dict[str, Any]]) -> list[str]:
    """Return what a reader must know before believing a figure: substitutions, limits, mixed machines, untold pairs."""
    notices = [text for study in studies for text in study.get("substitutions", [])]
    limits: dict[int, list[int]] = {}
    for source in sources:
        generated = source.record.config.get("bench") == ["wordproblems"]  # there --limit is the number made
        if source.record.kind in ("evaluate", "solve") and source.record.config.get("limit") and not generated:
            limits.setdefault(int(source.record.config["limit"]), []).append(source.number)
    for limit, numbers in limits.items():
        marks = "".join(f"[{number}]" for number in numbers)
        notices.append(f"Only the first {limit:,} items of each task were used in {marks} (--limit {limit}).")
    machines = {source.record.environment.get("gpu") or source.record.environment.get("cpu") for source in sources}
    if len(machines) > 1:
        notices.append("The records come from different machines: compare their times only within one record.")
    return notices


def _check(sources: Sequence[Source], one: str, two: str) -> str:
    total, same = identical(sources, one, two)
    verdict = "all" if same == total else f"only {same:,}"
    return (
        f"{one} and {two} were asked the same {total:,} problems: {verdict} of their answers are equal to the last "
        "character."
    )
