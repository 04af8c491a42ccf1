"""Kernels on torch's threads and without them, in forked children, and their cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_cases import threads as torch_threads

from mambacus.ops import simd
from mambacus.ops import threads as module
from mambacus.ops.threads import Kernel, thread_count


@Kernel
def mark(p, thread, threads):
    """Write thread + 1 to every task of this thread."""
    for task in range(thread, p[1], threads):
        simd.store(p[0] + task * simd.VECTOR, simd.splat(thread + 1.0))


def marks(tasks: int, count: int) -> list[int]:
    target = torch.zeros(tasks, simd.LANES)
    mark([target.data_ptr(), tasks], count)
    return target[:, 0].int().tolist()


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "python threads"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_task_is_done_once_by_its_thread(count, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(module, "_openmp", lambda: None)
    elif sys.platform == "linux":
        assert module._openmp() is not None, "torch for Linux brings GNU OpenMP"
    assert marks(7, count) == [task % count + 1 for task in range(7)]


def test_thread_count_follows_torch_the_tasks_and_the_work():
    with torch_threads(3):
        assert thread_count(8, 1e9) == 3
        assert thread_count(2, 1e9) == 2
        assert thread_count(8, 1e3) == 1


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )


SCAN = """
import time, torch
from mambacus.ops import selective_state_update
one, row = torch.ones(1, 8), torch.ones(1, 4)
start = time.process_time()
y, state = selective_state_update(torch.zeros(1, 8, 4), one, one, -torch.ones(8, 4), row, row)
print(y.sum().item(), time.process_time() - start)
"""


def test_a_second_process_does_not_compile(tmp_path):
    outputs = [run_python(SCAN, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split() for _ in range(2)]
    assert outputs[0][0] == outputs[1][0]
    assert list(tmp_path.glob("mambacus/kernels-*/**/*.nbc"))
    first, second = float(outputs[0][1]), float(outputs[1][1])
    assert second < first / 2, f"{first:.1f} s, then {second:.1f} s"


def test_no_place_for_the_cache_is_said_and_harmless():
    done = run_python(SCAN, NUMBA_CACHE_DIR="/dev/null/nowhere")
    assert "set NUMBA_CACHE_DIR" in done.stderr and float(done.stdout.split()[0]) > 0


def test_the_users_numba_settings_are_left_alone():
    from numba import config

    before = config.CACHE_DIR
    marks(1, 1)
    assert before == config.CACHE_DIR


FORKED = """
import os, torch
from mambacus.ops import selective_state_update
torch.set_num_threads(2)
def update():
    one, row = torch.ones(64, 96), torch.ones(64, 16)
    return selective_state_update(torch.zeros(64, 96, 16), one, one, -torch.ones(96, 16), row, row)[0].sum().item()
want = update()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's DataLoader does in its workers
    os._exit(0 if update() == want else 3)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_worker_can_run_kernels():
    run_python(FORKED)
