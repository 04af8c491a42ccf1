"""The peak of steps leaves out what came before them, where the system can count anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambacus.runtime.device import peak_memory_bytes
from mambacus.runtime.memory import PeakMemory

CPU = torch.device("cpu")
MIB = 2**20


def test_the_peak_is_that_of_the_steps() -> None:
    memory = PeakMemory(CPU)
    built = torch.ones(64 * MIB)  # 256 MiB
    whole = memory.read()
    assert memory.of == "process" and whole == peak_memory_bytes(CPU)
    del built
    memory.restart()
    if memory.of == "process":
        pytest.skip("this system has no /proc/self/clear_refs")
    before = memory.read()
    assert before < whole - 200 * MIB
    used = torch.ones(16 * MIB)  # 64 MiB
    del used
    assert 60 * MIB < memory.read() - before < 100 * MIB


def test_a_system_that_cannot_count_anew_says_so(tmp_path: Path) -> None:
    nothing = PeakMemory(CPU, tmp_path / "none")
    nothing.restart()
    assert nothing.of == "process" and nothing.read() == peak_memory_bytes(CPU)
    (tmp_path / "status").write_text("VmHWM:\t  1024 kB\n")
    (tmp_path / "clear_refs").mkdir()  # writing fails, as where the kernel forbids it
    refused = PeakMemory(CPU, tmp_path)
    refused.restart()
    assert refused.of == "process" and refused.read() == peak_memory_bytes(CPU)
    (tmp_path / "clear_refs").rmdir()
    granted = PeakMemory(CPU, tmp_path)
    granted.restart()
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert granted.of == "steps" and granted.read() == MIB
