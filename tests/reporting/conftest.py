from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import write_study

from mambacus.reporting.page import Page, build
from mambacus.reporting.sources import collect


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def page(study: Path) -> Page:
    return build(collect([study]), root=study)
