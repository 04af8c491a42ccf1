from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_records import record, write_record, write_solve, write_study

from mambacus.cli import main
from mambacus.runtime.records import read_record


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def drawn(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with page, record, plots and tables."""
    folder = tmp_path_factory.mktemp("drawn")
    extras = [word for flag in ("png", "svg", "tables") for word in (f"--{flag}", str(folder / flag))]
    assert main(["report", str(study), "--out", str(folder / "page.html"), *extras]) == 0
    return folder


def test_page_and_record(drawn):
    assert (drawn / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    record = read_record(drawn / "page.json")
    assert len(record.results["sources"]) == 11
    gain = next(row for row in record.results["comparisons"] if row["task"] == "wordproblems")
    assert (gain["gained"], gain["lost"], gain["verdict"]) == (430, 2, "better")


def test_plots_and_tables_are_files(drawn):
    names = ["change-tiny-tiny+lora", "radar", "training"]
    assert sorted(path.name for path in (drawn / "png").iterdir()) == [f"{name}.png" for name in names]
    assert sorted(path.name for path in (drawn / "svg").iterdir()) == [f"{name}.svg" for name in names]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (drawn / "png").iterdir())
    assert all(ElementTree.fromstring(path.read_bytes()).tag.endswith("svg") for path in (drawn / "svg").iterdir())
    tables = {path.name for path in (drawn / "tables").iterdir()}
    assert {"before-after-tiny+lora.tex", "solving.md", "all-scores.tex"} <= tables
    results = read_record(drawn / "page.json").results
    assert {Path(path).name for path in results["figures"]} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert {Path(path).name for path in results["tables"]} == tables


@pytest.mark.parametrize("results", [{}, {"rows": []}, {"rows": [], "ceilings": {}}])
def test_a_record_that_measured_nothing_is_named_on_the_page_and_in_the_terminal(results, tmp_path, capsys):
    write_record(tmp_path / "empty.json", record("bench", "130m", {"what": "prefill"}, results))
    assert main(["report", str(tmp_path / "empty.json"), "--out", str(tmp_path / "page.html")]) == 0
    said = "Nothing is drawn of [1] empty.json: see “Not drawn” for the reason."
    assert f"notice: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_with_a_figure_of_every_measurement_has_no_such_notice(drawn):
    assert "Nothing is drawn of" not in (drawn / "page.html").read_text(encoding="utf-8")


WITHOUT = """
import importlib.abc, importlib.metadata, sys

ABSENT = {"torch", "transformers", "numba", "lm_eval", "peft", "datasets", "triton"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

found = importlib.metadata.version
def version(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.version = version
from mambacus.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_reader_without_torch_draws_the_same_page(study, drawn, tmp_path):
    out = tmp_path / "page.html"
    extras = ["--svg", str(tmp_path / "svg"), "--tables", str(tmp_path / "tables")]
    command = [sys.executable, "-c", WITHOUT, "report", str(study), "--out", str(out), *extras]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "11 records, 6 paired comparisons" in done.stdout
    assert read_record(out.with_suffix(".json")).environment["packages"]["torch"] is None
    assert out.read_bytes() == (drawn / "page.html").read_bytes()
    for folder in ("svg", "tables"):
        for path in (drawn / folder).iterdir():
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()


def test_drawing_a_folder_again_passes_over_earlier_reports(study, tmp_path):
    folder = tmp_path / "study"
    write_study(folder)
    arguments = ["report", str(folder), "--out", str(folder / "report.html")]
    assert main(arguments) == 0
    first = (folder / "report.html").read_text()
    assert main([*arguments, "--overwrite"]) == 0
    assert (folder / "report.html").read_text() == first


def test_a_record_alone_is_enough(tmp_path):
    write_solve(tmp_path / "a.json", "one", {"gsm8k": [True, False]})
    assert main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "r.html"), "--title", "Mine"]) == 0
    assert "<h1>Mine</h1>" in (tmp_path / "r.html").read_text()


def _change(folder, **parts):
    file = write_solve(folder / "a.json", "m", {"gsm8k": [True]})
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda d: None, ["none.json"], "cannot read none.json"),
        (lambda d: None, [], "expected at least one record"),
        (lambda d: (d / "empty").mkdir(), ["empty"], "found none"),
        (lambda d: (d / "x.json").write_text("{}"), ["x.json"], "is not a mambacus record"),
        (lambda d: (d / "x.json").write_text("{"), ["x.json"], "x.json: not valid JSON"),
        (lambda d: write_solve(d / "a.json", "m", {"gsm8k": [True]}), ["a.json", "--out", "r.txt"], "ending in .html"),
        (lambda d: write_solve(d / "a.json", "m", {"gsm8k": [True]}), ["a.json", "--pairs", "m=n"], "no evaluate or"),
        (lambda d: (d / "report.html").write_text("mine"), ["a.json"], "add --overwrite"),
        (_change, ["a.json", "--out", "a.html"], "a.json, which is no report's"),
        (_change, ["a.json", "--out", "a.html", "--overwrite"], "a.json, which is no report's"),
        (_change, ["a.json", "--out", "a.json/x.html"], "expected a folder, got a file"),
        (_change, ["a.json", "--png", "a.json"], "--png a.json: expected a folder, got a file"),
        (lambda d: _change(d, kind="report"), ["a.json"], "expected the record of a measurement, got that of a report"),
        (lambda d: _change(d, results={}), ["a.json"], "results of solve: benches: expected a dict, got nothing"),
        (lambda d: _change(d, results={"benches": []}), ["a.json"], "benches: expected a dict, got a list"),
        (lambda d: _change(d, config=None), ["a.json"], "config: expected a dict, got null"),
    ],
)
def test_faults_are_one_line_and_change_nothing(tmp_path, monkeypatch, capsys, make, arguments, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_missing_items_file_is_named(tmp_path, capsys):
    write_solve(tmp_path / "a.json", "one", {"gsm8k": [True]})
    (tmp_path / "a.items.jsonl").unlink()
    assert main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "r.html")]) == 2
    assert "a.items.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_what_is_no_record_in_a_folder_is_passed_over(tmp_path):
    write_solve(tmp_path / "a.json", "one", {"gsm8k": [True, False]})
    for name, text in (("b.json", "{"), ("c.json", "[]"), ("d.json", '{"kind": "solve"}'), ("e.json", "\x00")):
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.json").mkdir()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    assert read_record(tmp_path / "r.json").results["sources"] == ["a.json"]


def test_a_newer_schema_is_refused(tmp_path, capsys):
    file = write_solve(tmp_path / "a.json", "one", {"gsm8k": [True]})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "record schema 99" in capsys.readouterr().err
