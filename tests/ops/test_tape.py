"""Tapes: runs of kernels and torch operations that are made again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_cases import threads

from mambacus.ops import linear, rms_norm
from mambacus.ops.tape import RecordingError, Tape


@pytest.mark.parametrize("count", [1, 2])
def test_gives_what_the_run_gives_for_new_numbers(count):
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(shape, generator=generator) for shape in ((2, 256), (1024, 256), (256, 1024)))
    total = torch.zeros(2, 256)

    def run():
        hidden = rms_norm(linear(x, w1).view(2, 1024), torch.ones(1024), 1e-5)  # kernels, and an operation: ones
        y = linear(hidden, w2).chunk(2, -1)[0].sigmoid()  # a view, an operation
        total[:, :128].add_(y)
        return y

    with threads(count), torch.inference_mode():
        tape, y = Tape.record(run)
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=generator.manual_seed(seed)))
            before = total.clone()
            tape.replay()
            found, after = y.clone(), total.clone()
            total.copy_(before)
            assert torch.equal(found, run()) and torch.equal(after, total)


def test_joins_kernels_that_follow_one_another():
    x, w = torch.randn(1, 256), torch.randn(256, 256)
    with torch.inference_mode():
        tape, _ = Tape.record(lambda: linear(linear(linear(x, w), w), w))
        split, _ = Tape.record(lambda: linear(linear(x, w) + 1, w))
    assert (len(tape), len(split)) == (1, 3)


def test_records_nothing_afterwards():
    x, w = torch.randn(1, 256), torch.randn(256, 256)
    with torch.inference_mode():
        tape, y = Tape.record(lambda: linear(x, w))
        linear(torch.randn(1, 256), w)
    assert len(tape) == 1 and torch.equal(y, linear(x, w))


@pytest.mark.parametrize("run", [lambda x: x.sum().item(), lambda x: x[x > 0]], ids=["item", "mask"])
def test_refuses_what_depends_on_numbers(run):
    with pytest.raises(RecordingError, match="depends on numbers"):
        Tape.record(lambda: run(torch.randn(8)))


def test_recording_does_not_load_torchs_compiler():
    """It takes seconds, at the second token that anybody generates."""
    code = (
        "import sys, torch\n"
        "from mambacus.ops.tape import Tape\n"
        "x = torch.ones(3)\n"
        "tape, y = Tape.record(lambda: x + 1)\n"
        "x.fill_(2)\n"
        "tape.replay()\n"
        "print(y.tolist(), [name for name in sys.modules if name.startswith('torch._dynamo')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3.0, 3.0, 3.0] []"
