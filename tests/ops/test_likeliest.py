"""The likeliest token of each row, where torch chooses it; its kernel: test_cuda_emulated.py and test_ops_gpu.py."""

from __future__ import annotations

import pytest
from kernel_checks import hold_likeliest

from mambacus.ops import likeliest


@pytest.mark.parametrize("columns", [1, 70, 5000])
def test_it_is_that_of_a_walk(columns):
    hold_likeliest(likeliest, columns)
