"""``mambacus demo``: the study on the embedded model, on a CPU, in minutes, without network.

It is the packaged recipe ``demo`` and nothing else: `mambacus study demo` does the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mambacus import study
from mambacus.runtime.config import opt, parse
from mambacus.runtime.records import Record

RECIPE = "demo"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of ``mambacus demo``."""

    out: Path = opt(Path("runs/demo"), "folder of the study", metavar="DIR")
    resume: bool = opt(False, "continue an interrupted demo")
    model: str = opt("tiny", "another Mamba model in place of the embedded one: a folder, a hub id or random:SIZE")
    limit: int = opt(0, "problems asked and optimiser steps (0: the recipe's); for a quick look only", least=0)


def run(config: Config) -> Record:
    """Run the demo's study.

    Returns:
        The study's record; the page, its record and all others lie in ``out``.

    Raises:
        UserError: as `mambacus.study.run`.
    """
    models = () if config.model == "tiny" else (config.model,)
    return study.run(
        study.Config(recipe=RECIPE, out=config.out, resume=config.resume, models=models, limit=config.limit)
    )


def main(argv: Sequence[str]) -> None:
    """Run from the command line and print base against tuned."""
    config = parse(Config, argv, "mambacus demo", (__doc__ or "").splitlines()[0])
    run(config)
    study.print_summary(config.out)
