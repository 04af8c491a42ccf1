"""Reading and decoding are told apart, on a GPU by its own clock."""

from __future__ import annotations

import pytest
import torch

from mambacus.inference import stats as module
from mambacus.inference.stats import Clock, EngineStats


class Host:
    """The host's clock, which goes on when told to; ``Event`` is a mark that a GPU comes to at ``reached``."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def event(self, reached: float) -> Event:
        return Event(self, reached)


class Event:
    def __init__(self, host: Host, reached: float) -> None:
        self.host, self.reached = host, reached

    def synchronize(self) -> None:
        self.host.now = max(self.host.now, self.reached)

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.reached - self.reached)


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(module, "time", host)
    return host


def test_on_a_cpu_reading_ends_when_it_was_called(host):
    stats = EngineStats()
    clock = Clock(stats, torch.device("cpu"))
    for reads, decodes in ((2, 0), (1, 4)):
        clock.begin(alone=True)
        host.work(reads)
        clock.has_read(ready=decodes > 0, goes_on=decodes == 0)
        host.work(decodes)
        clock.end()
    assert (stats.prefill_seconds, stats.decode_seconds) == (3, 4)


@pytest.mark.parametrize("gpu", [2, 20], ids=["the host is slower", "the GPU is slower"])
def test_what_is_queued_while_a_gpu_reads_is_decoding(host, monkeypatch, gpu):
    """Two passes that take the GPU ``gpu`` seconds each; the host queues one in 1 second and the first tokens in 10."""
    stats = EngineStats()
    clock, marks = Clock(stats, torch.device("cuda")), []

    def mark():
        reached = max(host.now, marks[0].reached + 2 * gpu) if marks else host.now
        marks.append(host.event(reached))
        return marks[-1]

    monkeypatch.setattr(clock, "_mark", mark)
    for ready in (False, True):
        clock.begin(alone=True)
        host.work(1)
        clock.has_read(ready=ready, goes_on=not ready)
        host.work(10 * ready)
        clock.end()
    assert len(marks) == 2
    assert stats.prefill_seconds == pytest.approx(2 * gpu)
    assert stats.prefill_seconds + stats.decode_seconds == pytest.approx(host.now - Host.now)
    clock.begin(alone=True)  # looks at the last tokens, and reads nothing
    clock.has_read(ready=False, goes_on=False)
    clock.end()
    host.work(1000)
    marks.clear()
    clock.begin(alone=True)  # the next prompts are read from now on
    host.work(1)
    clock.has_read(ready=True, goes_on=False)
    host.work(10)
    clock.end()
    assert stats.prefill_seconds == pytest.approx(4 * gpu)


def test_beside_rows_that_decode_the_hosts_clock_is_used(host, monkeypatch):
    stats = EngineStats()
    clock = Clock(stats, torch.device("cuda"))
    monkeypatch.setattr(clock, "_mark", lambda: pytest.fail("no mark was needed"))
    clock.begin(alone=False)
    host.work(1)
    clock.has_read(ready=True, goes_on=False)
    host.work(5)
    clock.end()
    assert (stats.prefill_seconds, stats.decode_seconds) == (1, 5)
