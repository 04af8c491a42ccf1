"""The pages in ``benchmarks/``: each is what ``mambacus report`` draws now from the records that it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mambacus.reporting.page import Page, build
from mambacus.reporting.sources import collect
from mambacus.reporting.undrawn import mentioned
from mambacus.runtime.records import read_record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGES = sorted(BENCHMARKS.glob("*.html"))
REDRAW = """
import sys
from pathlib import Path
from mambacus.reporting.page import build, render
from mambacus.reporting.sources import collect
from mambacus.runtime.records import read_record

for page in map(Path, sys.argv[1:]):
    record = read_record(page.with_suffix(".json"))
    flags = {name: record.config[name] for name in ("title", "pairs", "published")}
    sources = collect(page.parent / source for source in record.results["sources"])
    if render(build(sources, root=page.parent, **flags)).encode() != page.read_bytes():
        print(page.name)
assert not {"torch", "transformers", "numba"} & set(sys.modules)
"""


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.stem)
def page(request: pytest.FixtureRequest) -> Page:
    record = read_record(request.param.with_suffix(".json"))
    assert record.kind == "report"
    return build(collect(BENCHMARKS / source for source in record.results["sources"]), root=BENCHMARKS)


def test_every_page_is_what_its_records_draw_now_without_torch():
    assert PAGES
    command = [sys.executable, "-c", REDRAW, *map(str, PAGES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=BENCHMARKS.parent)
    assert (done.returncode, done.stdout) == (0, ""), f"stale (make pages): {done.stdout}{done.stderr}"
    assert all(page.stat().st_size < 2**20 for page in PAGES)


def test_every_record_beside_the_pages_is_on_one():
    named = {source for page in PAGES for source in read_record(page.with_suffix(".json")).results["sources"]}
    kinds = {path.name: json.loads(path.read_bytes())["kind"] for path in BENCHMARKS.glob("*.json")}
    missing = {name for name, kind in kinds.items() if kind not in ("report", "study")} - named
    assert not missing, f"on no page (make pages): {missing}"


def test_every_figure_names_its_record_and_every_record_its_file_and_command(page):
    numbers = set(range(1, len(page.records.rows) + 1))
    for section in page.sections:
        for table in section.tables:
            for row in table.rows:
                named = mentioned(row)
                assert named and named <= numbers, f"{table.name}: {[cell.text for cell in row]}"
        assert all(set(figure.numbers) <= numbers and figure.numbers for figure in section.figures)
    for _, _, file, command, started, _ in page.records.rows:
        assert (BENCHMARKS / file.text).is_file() and command.text and started.text


def test_nothing_of_these_records_is_left_out(page):
    assert page.undrawn.rows == ()
