"""Run Python with only what the package requires: ``python .ci/minimal.py -c CODE``, or ``FILE ...``.

Whatever else the environment holds (tools for tests, extras) cannot be imported, nor found as installed: the program
sees the standard library, this checkout, and a folder of links to the distributions that ``project.dependencies`` of
pyproject.toml ask for, directly or through others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def closure(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that requirements ask for, directly or through others, by name."""
    found: dict[str, metadata.Distribution] = {}
    wanted, seen = [Requirement(text) for text in requirements], set()
    while wanted:
        one = wanted.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen or (one.marker is not None and not one.marker.evaluate()):
            continue
        seen.add((name, extras))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # what needs it fails to import
        for text in found[name].requires or ():
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                inner.marker = None
                wanted.append(inner)
    return found


def link(distribution: metadata.Distribution, folder: Path) -> None:
    """Link the packages, modules and metadata of a distribution into a folder."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        target = folder / top
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(top))))


def main(argv: list[str]) -> int:
    """Run ``python argv...`` there and return its exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as folder:
        for distribution in closure(project["dependencies"]).values():
            link(distribution, Path(folder))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((folder, str(ROOT)))}
        return subprocess.run([sys.executable, "-S", *argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
