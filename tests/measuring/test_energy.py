"""Energy from the counters of a CPU and of a GPU, both made up here."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from mambacus.measuring.energy import Energy


def test_energy_is_counted_where_the_cpu_counts_it(tmp_path):
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for zone, value in ((package, 5_000_000), (part, 1)):
        zone.mkdir()
        (zone / "energy_uj").write_text(str(value))
        (zone / "max_energy_range_uj").write_text("9000000")
    with Energy(torch.device("cpu"), tmp_path) as energy:
        (package / "energy_uj").write_text("7500000")
    assert energy.joules == pytest.approx(2.5)
    with energy:
        (package / "energy_uj").write_text("500000")  # the counter started again at 9 J
    assert energy.joules == pytest.approx(2.0)
    with Energy(torch.device("cpu"), tmp_path / "nothing") as missing:
        pass
    assert missing.joules is None


@pytest.mark.parametrize(("supported", "joules"), [(True, 1.5), (False, None)])
def test_energy_is_counted_where_the_gpu_counts_it(monkeypatch, supported, joules):
    class NVMLError(Exception):
        pass

    millijoules = iter((2000, 3500))

    def consumption(handle: str) -> int:
        if not supported:
            raise NVMLError
        assert handle == "handle of GPU-12-34"
        return next(millijoules)

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetTotalEnergyConsumption=consumption,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pynvml")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-34"))
    with Energy(torch.device("cuda")) as energy:
        pass
    assert energy.joules == joules
