"""Peak memory of steps, without what came before them in this process, where the system can count anew."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from mambacus.runtime.device import peak_memory_bytes

PROC = Path("/proc/self")


class PeakMemory:
    """The peak memory of this process: allocated bytes of a GPU, resident bytes on a CPU.

    Args:
        device: where the steps run.
        proc: where Linux keeps what it knows of this process.

    Attributes:
        of: what the peak is of: ``steps`` since `restart`, or the ``process`` from its start.
    """

    def __init__(self, device: torch.device, proc: Path = PROC) -> None:
        self._device, self._proc = device, proc
        self.of = "process"

    def restart(self) -> None:
        """Count from here on, if the system can: a GPU's allocator can, and Linux by ``clear_refs`` (man 5 proc)."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.of = "steps"
        elif self._high_water() is not None:
            gc.collect()
            _give_back()
            self.of = "steps" if self._reset() else "process"

    def read(self) -> int:
        """Return the peak so far."""
        high_water = self._high_water() if self.of == "steps" and self._device.type == "cpu" else None
        return peak_memory_bytes(self._device) if high_water is None else high_water

    def _reset(self) -> bool:
        """Set the high-water mark to what is resident now; return whether the kernel lets us."""
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _high_water(self) -> int | None:
        """Return the most bytes that were resident since the mark was set, None where the kernel does not say."""
        status = self._proc / "status"
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return sizes[0] if sizes else None


def _give_back() -> None:
    """Let the C library return the memory that building freed, which would count as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
