"""A process that measures one case after another: starting one and importing libraries takes longer than most cases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from mambacus.measuring import cases
from mambacus.measuring.cases import Case, environment, failure, out_of_time

ROW = "row: "  # begins the line with which the process answers


class Measurer:
    """Measures cases: those of a CPU each in a process of its own, those of a GPU in one that is kept. A context."""

    def __init__(self) -> None:
        self._kept = KeptProcess()

    def __enter__(self) -> Measurer:
        """Return it; processes start with the first case."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process that was kept."""
        self._kept.close()

    def measure(self, case: Case, timeout_seconds: float) -> dict[str, Any]:
        """Return what `mambacus.measuring.cases.measure` returns."""
        if case.device.startswith("cuda"):
            return self._kept.measure(case, timeout_seconds)
        return cases.measure(case, timeout_seconds)


class KeptProcess:
    """A process that answers one case after another.

    It is replaced after a case that failed or ran out of time, after one whose memory it could not give back, and for
    another number of threads.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: IO[str] | None = None
        self._threads = 0

    def measure(self, case: Case, timeout_seconds: float) -> dict[str, Any]:
        """Return what `mambacus.measuring.cases.measure` returns.

        Raises:
            UserError: likewise.
        """
        row: dict[str, Any] = dataclasses.asdict(case)
        if reason := case.unavailable():
            return row | {"error": reason}
        process = self._running(case.threads)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(row) + "\n")
            process.stdin.flush()
            answer = self._lines.get(timeout=timeout_seconds)
        except BrokenPipeError:  # it ended while it waited
            answer = None
        except queue.Empty:
            self.close()
            return row | {"error": out_of_time(timeout_seconds)}
        if answer is None:
            return row | {"error": failure(case, process.wait(), self.close())}
        found = json.loads(answer)
        if not found.pop("gave_memory_back"):
            self.close()
        return row | found

    def _running(self, threads: int) -> subprocess.Popen[str]:
        """Return the process, started if there is none for so many threads."""
        if self._process is not None and self._threads == threads and self._process.poll() is None:
            return self._process
        self.close()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 -- `close` does
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mambacus.measuring.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment(threads),
        )  # fmt: skip
        self._lines, self._threads = queue.Queue(), threads
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process

    def close(self) -> str:
        """End the process and return what it said on stderr."""
        process, errors, said = self._process, self._errors, ""
        self._process = self._errors = None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # a case that it did not read
                        stream.close()
        if errors is not None:
            errors.seek(0)
            said = errors.read()
            errors.close()
        return said


def _pass_on(stdout: IO[str], lines: queue.Queue[str | None]) -> None:
    """Put every answer into ``lines``, and None at the end."""
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in stdout:
            if line.startswith(ROW):
                lines.put(line.removeprefix(ROW))
    lines.put(None)
