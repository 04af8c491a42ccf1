"""The structure the documents promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mambacus"
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (600 if path.name in ("cpu.py", "gpu.py") else 500), "split this file"
    assert path.name not in ("utils.py", "common.py", "helpers.py"), "name it after what it holds"


def test_import_directions():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_map_names_every_command_and_what_stands_beside_it():
    words = set(re.findall(r"\w+\.py", (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert {path.name for path in PACKAGE.glob("[!_]*.py")} <= words
    assert {path.name for path in (PACKAGE / "measuring").glob("[!_]*.py")} <= words


def test_what_imports_is_tested_without_the_extras():
    """However much is installed: only the package's own requirements, and theirs, can be imported."""
    script = PACKAGE.parent / ".ci" / "minimal.py"
    code = "import torch, yaml; from importlib.util import find_spec; print([find_spec(n) for n in ('pytest', 'ruff')])"
    done = subprocess.run([sys.executable, script, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[None, None]\n", done.stderr
    assert subprocess.run([sys.executable, script, "-c", "import pytest"], capture_output=True, check=False).returncode


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_bare_or_swallowed_exception(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert not all(isinstance(part, ast.Pass) for part in node.body), f"line {node.lineno}: swallowed exception"
