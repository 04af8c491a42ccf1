"""Energy used meanwhile, where the device counts it: NVML on NVIDIA GPUs, RAPL on CPUs whose counters may be read.

Both count the whole device, idle power and other programs included. The GPU's counter moves every 20 to 100 ms, so
only runs of seconds say something.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


class Energy:
    """A context manager that counts from its start to its end.

    Args:
        device: the GPU, or the CPU for all its packages.
        rapl: where Linux lists the CPU's counters.

    Attributes:
        joules: used meanwhile; None where nothing counts.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._device, self._rapl = device, rapl
        self.joules: float | None = None
        self._before: list[float] = []

    def __enter__(self) -> Energy:
        """Read the counters."""
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        """Read them again."""
        after = self._read()
        if self._before and len(after) == len(self._before):
            used = [
                end - start + (wrap if end < start else 0.0)
                for start, end, wrap in zip(self._before, after, self._wraps(), strict=True)
            ]
            self.joules = sum(used)

    def _read(self) -> list[float]:
        """Return every counter in joules."""
        if self._device.type == "cuda":
            return _nvml_joules(self._device)
        return [value for zone in self._zones() if (value := _microjoules(zone / "energy_uj")) is not None]

    def _wraps(self) -> list[float]:
        """Return the value at which each counter starts again."""
        if self._device.type == "cuda":
            return [0.0]
        return [_microjoules(zone / "max_energy_range_uj") or 0.0 for zone in self._zones()]

    def _zones(self) -> list[Path]:
        """Return the CPU packages whose counter may be read."""
        zones = sorted(self._rapl.glob("intel-rapl:[0-9]*"))
        packages = [zone for zone in zones if zone.name.count(":") == 1]
        return [zone for zone in packages if _microjoules(zone / "energy_uj") is not None]


def _microjoules(path: Path) -> float | None:
    """Return a counter in joules, None if it is not there or for the administrator only."""
    try:
        return int(path.read_text()) / 1e6
    except OSError:
        return None


def _nvml_joules(device: torch.device) -> list[float]:
    """Return what the GPU has used since its driver was loaded; nothing without NVML's Python module or its counter."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3]
    except pynvml.NVMLError:  # no such library, a part of a GPU, an old GPU: the row says null
        return []
