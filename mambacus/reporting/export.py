"""The page's tables as Markdown and LaTeX files: the same cells as on the page, for papers and README files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mambacus.reporting.table import Cell, Table
from mambacus.runtime.records import write_bytes_atomic

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}",
    "*": "{*}",  # a bare one at the head of a row would be taken as that of \\*
    "−": "$-$", "×": r"$\times$", "→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "\N{NO-BREAK SPACE}": "~", "·": r"$\cdot$", "–": "--", "…": r"\ldots{}", "“": "``", "”": "''", "’": "'",
    "≈": r"$\approx$", "±": r"$\pm$", "µ": r"$\mu$",
    "⁻": r"$^{-}$",
    **{raised: f"$^{digit}$" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~])")


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write every table as ``NAME.md`` and ``NAME.tex`` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in tables:
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", table.name).strip("-")
        for path, text in ((folder / f"{name}.md", markdown(table)), (folder / f"{name}.tex", latex(table))):
            write_bytes_atomic(path, text.encode())
            files.append(path)
    return files


def markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown: notes in brackets behind the figure, the best of a row in bold."""
    head = [_escape_markdown(column) for column in table.headings]
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [head, rule, *([_markdown_cell(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text, note = _escape_markdown(cell.text), _escape_markdown(cell.note.strip())
    text = f"**{text}**" if cell.style == "best" else text
    return f"{text} ({note})" if note else text


def _escape_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text).replace("\n", " ")


def latex(table: Table) -> str:
    r"""Return a ``tabular`` for ``\input``; it needs ``\usepackage{booktabs}``. Notes are set smaller."""
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    lines = [
        [escape_latex(column) for column in table.headings],
        *([_latex_cell(cell) for cell in row] for row in table.rows),
    ]
    head, *body = (" & ".join(line) + r" \\" for line in lines)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
                      r"\end{tabular}", ""])  # fmt: skip


def _latex_cell(cell: Cell) -> str:
    text, note = escape_latex(cell.text), escape_latex(cell.note.strip())
    text = rf"\textbf{{{text}}}" if cell.style == "best" else rf"\texttt{{{text}}}" if cell.style == "code" else text
    return rf"{text} {{\scriptsize {note}}}" if note else text


def escape_latex(text: str) -> str:
    """Return ``text`` so that LaTeX prints it as it stands: its special characters and the page's symbols."""
    return "".join(_LATEX.get(character, character) for character in text.replace("\n", " "))
