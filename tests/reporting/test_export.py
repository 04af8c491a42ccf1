"""Tables as Markdown and LaTeX: the page's own cells, escaped so that they print as they stand."""

from __future__ import annotations

import re

import pytest

from mambacus.reporting.export import escape_latex, latex, markdown, write_tables
from mambacus.reporting.table import Cell, filled, make_table

TABLE = make_table(
    "a & b", ("Task", "#tiny_lora"), [[Cell("50 % | x", "n = 3 [1]"), Cell("−1.5", style="best")], ["*a*", "{$}"]]
)


def test_markdown():
    assert markdown(TABLE).splitlines() == [
        r"| Task | tiny\_lora |",
        "| --- | ---: |",
        r"| 50 % \| x (n = 3 \[1\]) | **−1.5** |",
        r"| \*a\* | {$} |",
    ]


def test_latex():
    assert latex(TABLE).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"Task & tiny\_lora \\",
        r"\midrule",
        r"50 \% \textbar{} x {\scriptsize n = 3 {[}1{]}} & \textbf{$-$1.5} \\",
        r"{*}a{*} & \{\$\} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize("character", list("\\&%$#_{}~^<>|[]*µ"))
def test_no_special_character_of_latex_survives(character):
    text = escape_latex(f"a{character}b")
    assert text != f"a{character}b" and text.startswith("a") and text.endswith("b")


def test_every_figure_of_the_page_is_in_the_files(page, tmp_path):
    files = write_tables(page.tables, tmp_path / "tables")
    assert {file.suffix for file in files} == {".md", ".tex"}
    assert len(files) == len(set(files)) == 2 * len(page.tables)
    for table, written, set_ in zip(page.tables, files[::2], files[1::2], strict=True):
        plain, tex = written.read_text(encoding="utf-8"), set_.read_text(encoding="utf-8")
        assert tex.count(r"\\") == len(table.rows) + 1 and plain.count("\n") == len(table.rows) + 2
        for row in table.rows:
            for figure in re.findall(r"\d[\d,.]*", " ".join(cell.text + " " + cell.note for cell in row)):
                assert figure in plain and figure in tex
        symbols = set(re.findall(r"[^\x00-\x7f]", tex))
        assert not symbols, f"{set_.name}: LaTeX would not print {symbols}"


def test_columns_that_say_nothing_are_left_out():
    table = filled(make_table("t", ("A", "#B", "C"), [["x", "–", ""], ["y", "–", "z"]]))
    assert table.columns == ("A", "C") and [cell.text for cell in table.rows[1]] == ["y", "z"]
