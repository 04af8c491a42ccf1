"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the evaluation data: $MAMBACUS_DATA_DIR, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("MAMBACUS_DATA_DIR", default))
    if not (path / "zeroshot").is_dir():
        pytest.skip(f"no data folder at {path}; set MAMBACUS_DATA_DIR")
    return path


@pytest.fixture(autouse=True)
def _gpu_required_means_gpu_required(request: pytest.FixtureRequest) -> None:
    """A GPU test skips without a GPU, unless MAMBACUS_REQUIRE_GPU=1: then it fails."""
    if request.node.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("MAMBACUS_REQUIRE_GPU") == "1":
        pytest.fail("MAMBACUS_REQUIRE_GPU=1 but torch sees no GPU")
    pytest.skip("no GPU")
