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
LONGEST_ANSWER = 1000  # characters kept of a line, more than any answer has
STATUSES = ("ok", "error", "forbidden", "memory", "unavailable")  # what the worker says; the rest is seen from here


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
            ``output`` (it used more than it may); ``crash`` (a signal ended it); ``too long`` (it was not run);
            ``unavailable`` (this machine cannot hold it: not run).
        detail: the exception, the thing it tried or the signal; for ``time``, whether ``CPU`` or ``clock`` ran out.
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
    """Run a program and return how it ended; `check_available` says beforehand whether programs can be held."""
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
        deadline = started + limits.wall_seconds
        printed, verdict, cut = _read(process, limits, deadline)
        code = None if cut is not None else process.wait(max(0.0, deadline - time.monotonic()))
        return _judge(printed, verdict, cut, code)
    except subprocess.TimeoutExpired:  # it closed its pipes and stayed
        return Outcome("time", "clock", None)
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
    found = run_program("print(1)", Limits(wall_seconds=120.0))
    if found.status != "ok":
        raise UserError(
            f"this machine cannot hold programs: {found.status} {found.detail}".strip() + "; use --style cot"
        )


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
        return Outcome(cut, "clock" if cut == "time" else "", None)
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGSYS:
            return Outcome("forbidden", "system call", None)
        spent = -code in (signal.SIGXCPU, signal.SIGKILL)
        return Outcome("time", f"CPU, {name}", None) if spent else Outcome("crash", name, None)
    said = _said(verdict)
    if said is None:
        return Outcome("error", "the program left without a verdict", None)
    status, detail, value = said
    if status != "ok":
        return Outcome(status, detail, None)
    lines = [line.strip() for line in printed.decode("utf-8", errors="replace").splitlines() if line.strip()]
    answer = lines[-1] if lines else value
    return Outcome("ok", "", None if answer is None else answer[:LONGEST_ANSWER])


def _said(verdict: bytes) -> tuple[str, str, str | None] | None:
    """Return status, detail and value of the last line on the verdict's pipe, where a program may have written too.

    A program can write a verdict of its own, which is no more than an answer: what it says is held to be text of the
    forms that the worker writes, and None is returned for all else.
    """
    try:
        said = json.loads(verdict.rsplit(b"\n", 1)[-1])
        status, detail, value = said["status"], said["detail"], said["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if status not in STATUSES or not isinstance(detail, str) or not isinstance(value, (str, type(None))):
        return None
    return status, _printable(detail), None if value is None else _printable(value)


def _printable(text: str) -> str:
    """Return the text as it can be written to a file: a program's strings may hold halves of characters."""
    return text.encode("utf-8", errors="replace").decode()[:LONGEST_ANSWER]
