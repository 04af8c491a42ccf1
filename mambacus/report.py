"""``mambacus report RECORD|DIR ... --out report.html``: draw records as one HTML page with tables and plots.

The page needs nothing but itself: no network, no torch, no browser plug-in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import check_writable, claim_file
from mambacus.runtime.records import Record, Stopwatch, read_record, write_bytes_atomic, write_record


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus report``."""

    records: tuple[str, ...] = opt((), "record files, or folders searched for them", positional=True, metavar="RECORD")
    out: Path = opt(Path("report.html"), "the HTML page to write; its own record goes beside it", metavar="FILE.html")
    png: Path | None = opt(None, "folder for the plots as PNG", metavar="DIR")
    svg: Path | None = opt(None, "folder for the plots as SVG", metavar="DIR")
    tables: Path | None = opt(None, "folder for the tables as Markdown and LaTeX (booktabs)", metavar="DIR")
    title: str = opt("", "heading (default: the study's title)")
    pairs: tuple[str, ...] = opt((), "labels compared, as base=tuned (default: found in the records)")
    published: bool = opt(True, "show figures that others published beside measured ones, marked as such")
    overwrite: bool = opt(False, "replace an existing page")


def run(config: Config) -> Record:
    """Draw the page, the plots and tables as files if asked for, and the record of all.

    Returns:
        A record of kind ``report``: ``results`` holds ``sources`` (files read, as seen from the page's folder),
        ``comparisons`` (every paired comparison on the page), ``headline``, ``checks`` and ``notices`` (sentences on
        the page), ``page_bytes``, ``published`` (figures of others that it shows), ``figures`` and ``tables`` (files).

    Raises:
        UserError: a file that is no record, a folder without any, an unknown label, or an existing page without
            ``overwrite``. The record of a measurement is never overwritten.
    """
    from mambacus.reporting.export import write_tables
    from mambacus.reporting.page import build, render
    from mambacus.reporting.sources import collect, shown_path

    watch = Stopwatch()
    _check_outputs(config)
    sources = collect(config.records)
    page = build(sources, title=config.title, pairs=config.pairs, root=config.out.parent, published=config.published)
    html = render(page).encode()
    write_bytes_atomic(config.out, html)
    figures: list[Path] = []
    folders = {kind: folder for kind, folder in (("png", config.png), ("svg", config.svg)) if folder is not None}
    if folders:
        from mambacus.reporting.figures import draw

        figures = draw(page, folders)
    tables = write_tables(page.tables, config.tables) if config.tables is not None else []
    results = {
        "sources": [shown_path(source, config.out.parent) for source in sources],
        "comparisons": [
            dataclasses.asdict(row) | {"verdict": row.verdict} for pair in page.pairs for row in pair.comparisons
        ],
        "headline": list(page.headline),
        "checks": list(page.checks),
        "notices": list(page.notices),
        "page_bytes": len(html),
        "published": [
            {"label": label, "task": task, "metric": metric, "value": value, "source": page.published.origins[key]}
            for key, value in page.published.values.items()
            for label, task, metric in [key]
        ],
        "figures": [str(figure) for figure in figures],
        "tables": [str(table) for table in tables],
    }
    record = watch.record("report", page.title, config, results)
    write_record(config.out.with_suffix(".json"), record)
    return record


def _check_outputs(config: Config) -> None:
    if config.out.suffix != ".html":
        raise UserError(f"--out: expected a name ending in .html, got {str(config.out)!r}")
    record = config.out.with_suffix(".json")
    if record.is_file() and read_record(record).kind != "report":
        raise UserError(
            f"--out {config.out}: its record would replace {record}, which is no report's; choose another name"
        )
    for path in (config.out, record):
        claim_file(path, overwrite=config.overwrite)
    for flag, folder in (("--png", config.png), ("--svg", config.svg), ("--tables", config.tables)):
        if folder is not None:
            check_writable(folder, flag)


def main(argv: Sequence[str]) -> None:
    """Run from the command line and say what was drawn."""
    config = parse(Config, argv, "mambacus report", (__doc__ or "").splitlines()[0])
    record = run(config)
    results = record.results
    from mambacus.reporting.console import paired_text

    if results["comparisons"]:
        print(paired_text(results["comparisons"]) + "\n")
    print(f"{len(results['sources'])} records, {len(results['comparisons'])} paired comparisons")
    for notice in results["notices"]:
        print(f"notice: {notice}")
    for figure in results["figures"]:
        print(f"figure: {figure}")
    if config.tables is not None:
        print(f"tables: {len(results['tables'])} files in {config.tables}")
    print(f"page:   {config.out} ({results['page_bytes'] / 1024:.0f} KiB)")
