"""Reading and decoding are told apart, on a GPU by its own clock."""

from __future__ import annotations

import time

import pytest
import torch

from mambacus.inference.stats import Clock, EngineStats


class Event:
    """Of a GPU that comes to it at ``reached``, seconds of the host's clock."""

    def __init__(self, reached: float) -> None:
        self.reached = reached

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.reached - time.perf_counter()))

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.reached - self.reached)


def test_on_a_cpu_reading_ends_when_it_was_called():
    stats = EngineStats()
    clock = Clock(stats, torch.device("cpu"))
    for reads, decodes in ((0.02, 0.0), (0.01, 0.03)):
        clock.begin(alone=True)
        time.sleep(reads)
        clock.has_read(ready=decodes > 0)
        time.sleep(decodes)
        clock.end()
    assert stats.prefill_seconds == pytest.approx(0.03, abs=0.01) and stats.decode_seconds == pytest.approx(
        0.03, abs=0.01
    )


@pytest.mark.parametrize("gpu", [0.02, 0.2], ids=["the host is slower", "the GPU is slower"])
def test_what_is_queued_while_a_gpu_reads_is_decoding(gpu, monkeypatch):
    """Two passes that take the GPU ``gpu`` seconds each; the host queues one in 0.01 and the first tokens in 0.1."""
    stats = EngineStats()
    clock, marks = Clock(stats, torch.device("cuda")), []

    def mark():
        marks.append(Event(time.perf_counter() if not marks else max(time.perf_counter(), marks[0].reached + 2 * gpu)))
        return marks[-1]

    monkeypatch.setattr(clock, "_mark", mark)
    began = time.perf_counter()
    for ready in (False, True):
        clock.begin(alone=True)
        time.sleep(0.01)
        clock.has_read(ready=ready)
        time.sleep(0.1 * ready)
        clock.end()
    whole = time.perf_counter() - began
    assert len(marks) == 2
    assert stats.prefill_seconds == pytest.approx(2 * gpu, abs=0.02)
    assert stats.prefill_seconds + stats.decode_seconds == pytest.approx(whole, abs=0.005)


def test_beside_rows_that_decode_the_host_s_clock_is_used(monkeypatch):
    clock = Clock(EngineStats(), torch.device("cuda"))
    monkeypatch.setattr(clock, "_mark", lambda: pytest.fail("no mark was needed"))
    clock.begin(alone=False)
    clock.has_read(ready=True)
    clock.end()
