"""Running programs that a model wrote: each in a process of its own that can compute and nothing else.

What holds a program (`sandbox_worker` sets it up before the first line runs): no files, no network, no processes or
threads (a seccomp filter kills on any other system call), limits on CPU time, memory and wall-clock time, an empty
environment, and output that is cut. It needs Linux on x86-64 or ARM64; elsewhere programs are refused, not run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mambacus.runtime.errors import UserError

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
LONGEST_PROGRAM = 32_768  # bytes; a pipe takes them without a reader


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of CPU time.
        wall_seconds: of wall-clock time, the start of the process included.
        bytes: of address space.
        output: bytes of what it prints.
    """

    seconds: int = 5
    wall_seconds: float = 15.0
    bytes: int = 512 * 2**20
    output: int = 65_536


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: ``ok``; ``error`` (it raised); ``forbidden`` (it tried to reach outside); ``time``, ``memory`` or
            ``output`` (it used more than it may); ``crash`` (a signal ended it); ``too long`` (it was not run).
        detail: the exception, the thing it tried or the signal.
        answer: the last line it printed, else the value it left; None if neither or if it did not end well.
    """

    status: str
    detail: str
    answer: str | None


def program_in(completion: str) -> str:
    """Return the program in a completion that goes on after an opened Python fence, or that opens one of its own."""
    fenced = _FENCE.search(completion)
    if fenced and fenced[0].startswith(("```python", "```py")):
        return fenced[1]
    return completion.split("```", 1)[0]


@functools.lru_cache(maxsize=4096)  # samples of one problem repeat themselves
def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a program and return how it ended.

    Raises:
        UserError: this machine cannot hold a program.
    """
    program = source.encode("utf-8", errors="replace")
    if len(program) > LONGEST_PROGRAM:
        return Outcome("too long", f"{len(program)} bytes", None)
    started = time.monotonic()
    allowed = json.dumps({"bytes": limits.bytes, "seconds": limits.seconds})
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_WORKER), allowed],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"}, cwd="/",
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(program)
        process.stdin.close()
        printed, verdict, cut = _read(process, limits, started + limits.wall_seconds)
        return _judge(printed, verdict, cut, process.wait() if cut is None else None)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def run_programs(sources: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:
    """Run programs, as many at once as there are cores, and return their outcomes in order."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda source: run_program(source, limits), sources))


def check_available() -> None:
    """Make sure, before long work, that programs can be held here.

    Raises:
        UserError: they cannot; the message says why.
    """
    if sys.platform != "linux":
        raise UserError(f"programs run on Linux only (seccomp), this is {sys.platform}; use --style cot")
    run_program("print(1)")


def _read(process: subprocess.Popen[bytes], limits: Limits, deadline: float) -> tuple[bytes, bytes, str | None]:
    """Return what came out of the two pipes, and ``time`` or ``output`` if the program had to be stopped for it."""
    assert process.stdout is not None and process.stderr is not None
    found = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in found:
            selector.register(stream, selectors.EVENT_READ, stream)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                return bytes(found[process.stdout]), b"", "time"
            for key, _ in ready:
                piece = os.read(key.fd, 65_536)
                found[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                if len(found[key.data]) > limits.output:
                    return b"", b"", "output"
    return bytes(found[process.stdout]), bytes(found[process.stderr]), None


def _judge(printed: bytes, verdict: bytes, cut: str | None, code: int | None) -> Outcome:
    if cut is not None:
        return Outcome(cut, "", None)
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGSYS:
            return Outcome("forbidden", "system call", None)
        return Outcome("time" if -code in (signal.SIGXCPU, signal.SIGKILL) else "crash", name, None)
    try:
        said = json.loads(verdict)
        status, detail, value = str(said["status"]), str(said["detail"]), said["value"]
    except (ValueError, KeyError, TypeError):
        return Outcome("error", "the program wrote over its verdict or left without one", None)
    if status == "unavailable":
        raise UserError(f"this machine cannot hold programs: {detail}; use --style cot")
    if status != "ok":
        return Outcome(status, detail, None)
    lines = [line.strip() for line in printed.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return Outcome("ok", "", lines[-1] if lines else value if isinstance(value, str) else None)
