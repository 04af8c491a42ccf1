"""The inside of the sandbox: a script of its own that locks itself in and then runs one untrusted program.

Started by `mambacus.evals.sandbox` as ``python -I -S sandbox_worker.py LIMITS`` with the program on standard input. It
imports nothing but the standard library. What the program prints goes to standard output; the verdict, one JSON object,
to standard error.

The kernel is the wall: resource limits, then a seccomp filter that lets through some twenty system calls (memory,
clock, read and write on the three open pipes, exit) and kills the process on any other, those of the 32-bit and x32
interfaces too. Before the wall stands an
audit hook, which only serves to name what a program tried: ``import socket``, ``os.system``, ``open``.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

PREIMPORTED = (
    "__future__", "abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json", "math",
    "numbers", "operator", "pprint", "random", "re", "statistics", "string", "textwrap", "time", "types", "typing",
    "_strptime",
)  # fmt: skip
# Audit events of plain Python: what they do stays inside the process.
HARMLESS = frozenset(
    {"compile", "exec", "builtins.id", "object.__getattr__", "object.__setattr__", "object.__delattr__", "code.__new__",
     "function.__new__", "sys._getframe", "sys.unraisablehook", "sys.excepthook", "time.sleep"}
)  # fmt: skip

PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 4, 22, 2
KILL_PROCESS, ALLOW, DENY = 0x80000000, 0x7FFF0000, 0x00050001  # DENY: the call fails with EPERM
PROT_EXEC = 4
LAST_ADVICE = 25  # of madvise(2): above stand MADV_HWPOISON and MADV_SOFT_OFFLINE, by which root breaks a page of RAM
# linux/audit.h's number of the architecture, and the numbers of the system calls there (asm/unistd.h).
ARCHITECTURES = {
    "x86_64": (0xC000003E, {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
        "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60,
        "gettimeofday": 96, "time": 201, "futex": 202, "clock_gettime": 228, "clock_nanosleep": 230,
        "exit_group": 231, "openat": 257, "newfstatat": 262, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "openat": 56, "close": 57, "lseek": 62, "read": 63, "write": 64, "newfstatat": 79, "fstat": 80, "exit": 93,
        "exit_group": 94,
        "futex": 98, "clock_gettime": 113, "clock_nanosleep": 115, "sched_yield": 124, "rt_sigreturn": 139,
        "gettimeofday": 169, "getpid": 172, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
        "madvise": 233, "getrandom": 278,
    }),
}  # fmt: skip
FAILS = ("openat", "newfstatat")  # Python itself looks for source files to show: fails instead of killing
NAME = "<program>"  # the file that the program seems to come from
NO_CODE = ("mmap", "mprotect")  # refused where they would make memory executable


def main() -> None:
    """Lock the process in, run the program, say how it ended."""
    limits = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode()
    for name in PREIMPORTED:
        __import__(name)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    report = _reporter(os.write, os._exit, json.dumps)
    try:
        _limit(limits)
        _filter_system_calls()
    except OSError as error:
        report("unavailable", f"{error.strerror or error}", None)
    for name in ("ctypes", "ctypes._endian", "_ctypes", "resource"):
        sys.modules.pop(name, None)
    _watch(report)
    report(*_outcome(source))


def _reporter(write: Any, leave: Any, dump: Any) -> Any:
    def report(status: str, detail: str, value: str | None) -> None:
        """Write the verdict and leave at once: nothing of the program runs any more, no handler and no finaliser."""
        write(2, b"\n" + dump({"status": status, "detail": detail[:300], "value": value}).encode())
        leave(0)

    return report


def _limit(limits: dict[str, int]) -> None:
    """Set the kernel's limits, hard ones, so that the program cannot raise them again."""
    for which, amount in (
        (resource.RLIMIT_AS, limits["bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(which, (amount, amount))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"] + 1))


def _filter_system_calls() -> None:
    """Install the seccomp filter: a program of classic BPF, checked against linux/seccomp.h."""
    if platform.machine() not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {platform.machine()}")
    code = _bpf(*ARCHITECTURES[platform.machine()])
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    for arguments in (
        (PR_SET_DUMPABLE, 0, 0, 0, 0),
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


def _bpf(architecture: int, numbers: dict[str, int]) -> bytes:
    """Return the filter: another architecture dies, listed calls pass, executable memory is refused, the rest dies."""
    load_word, jump_equal, jump_above, jump_bits, leave = 0x20, 0x15, 0x25, 0x45, 0x06  # opcodes of linux/filter.h
    number_at, architecture_at, third_argument_at = 0, 4, 32  # places in struct seccomp_data

    def step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", operation, if_true, if_false, value)

    def guarded(number: int, test: bytes) -> list[bytes]:
        """The call fails where the test on its third argument holds, and passes where it does not."""
        look = [step(jump_equal, number, 0, 4), step(load_word, third_argument_at)]
        return [*look, test, step(leave, DENY), step(leave, ALLOW)]

    steps = [
        step(load_word, architecture_at),
        step(jump_equal, architecture, 1, 0),
        step(leave, KILL_PROCESS),
        step(load_word, number_at),
    ]
    for name, number in numbers.items():
        if name in NO_CODE:
            steps += guarded(number, step(jump_bits, PROT_EXEC, 0, 1))
        elif name == "madvise":
            steps += guarded(number, step(jump_above, LAST_ADVICE, 0, 1))
        else:
            steps += [step(jump_equal, number, 0, 1), step(leave, DENY if name in FAILS else ALLOW)]
    return b"".join([*steps, step(leave, KILL_PROCESS)])


def _watch(report: Any) -> None:
    """Stop at the first event that would reach outside, by its name."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        shown = event == "open" and type(arguments[0]) is str and arguments[0] == NAME  # in a SyntaxError
        if event not in HARMLESS and not shown:
            named = event == "import" or event in ("open", "os.system")
            first = arguments[0] if named and arguments else ""
            what = first.decode(errors="replace") if isinstance(first, bytes) else first
            report("forbidden", f"{event} {what if isinstance(what, (str, int)) else ''}".strip(), None)

    sys.addaudithook(hook)


def _outcome(source: str) -> tuple[str, str, str | None]:
    """Run the program and return status, detail and the value it leaves if it prints none."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # site, which is left out, has them
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(source, NAME, "exec"), names)
        return "ok", "", _value(names)
    except MemoryError:
        return "memory", "MemoryError", None
    except SystemExit:
        return "ok", "", None
    except BaseException as error:  # noqa: BLE001 -- whatever the program raises is its own fault, told by name
        return "error", _described(error), None


def _described(error: BaseException) -> str:
    """Return the name and the message of an exception whose class the program may have written."""
    name = type.__dict__["__name__"].__get__(type(error))  # a metaclass may hide it
    try:
        return f"{name}: {error}"
    except BaseException:  # noqa: BLE001 -- its __str__ is the program's too
        return f"{name}: a message that cannot be shown"


def _value(names: dict[str, Any]) -> str | None:
    """Return the variable ``answer``, ``result`` or ``ans``, else what the last function without arguments returns."""
    for name in ("answer", "result", "ans"):
        if name in names and not callable(names[name]):
            return str(names[name])[:300]
    functions: list[Any] = [value for value in names.values() if type(value) is type(_value)]
    ready = [each for each in functions if each.__code__.co_argcount == len(each.__defaults__ or ())]
    named = [each for each in ready if each.__name__ == "solution"]
    if not ready:
        return None
    found = (named or ready)[-1]()
    return None if found is None else str(found)[:300]


if __name__ == "__main__":
    main()
