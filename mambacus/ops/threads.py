"""Kernels compiled by numba, run on the OpenMP threads that torch already has.

Numba's own ``prange`` starts a second pool of threads, which fights with torch's for the cores between two matrix
products, depends on a system library that slim images lack, and aborts in a forked child. A `Kernel` is a plain
compiled function that is told which share of the tasks is its own; torch's OpenMP runtime calls it on every thread.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import cfunc, config, types
from numba.extending import intrinsic

_SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)
_COMPILING = threading.Lock()
_local = threading.local()  # calls: where this thread's kernel calls are recorded, None or absent for nowhere
WORTH_A_THREAD = 30_000  # nanoseconds of work for which it pays to wake another thread


class Kernel:
    """A function ``f(p, thread, threads)`` compiled at its first call.

    With ``cache`` the machine code is kept on disk for the next process.

    ``p[i]`` is the i-th argument, an integer: a size, a flag or the address of memory. The function does the tasks
    ``thread, thread + threads, ...`` of a numbering of its own, so that who does a task never changes its result.
    """

    def __init__(self, function: Callable[..., None], *, cache: bool = True) -> None:
        self._function = function
        self._cache = cache
        self._entry: Any = None
        self._address = 0
        functools.update_wrapper(self, function)

    def __call__(self, arguments: Sequence[int], threads: int) -> None:
        """Run on ``threads`` threads and wait; the caller keeps the tensors behind the addresses alive."""
        if self._entry is None:
            self._compile()
        frame = array.array("q", arguments)
        calls = getattr(_local, "calls", None)
        if calls is not None:
            calls.append(Call(self, self._address, frame, threads))
        self.run(frame, threads)

    def run(self, frame: array.array[int], threads: int) -> None:
        """Run on arguments that are in memory already."""
        address = frame.buffer_info()[0]
        if threads == 1:
            self._entry(address, 0, 1)
        elif (start := _openmp()) is not None:
            team = array.array("q", [self._address, address])
            start(_team().address, team.buffer_info()[0], threads, 0)
        else:
            list(_pool(threads).map(self._entry, [address] * threads, range(threads), [threads] * threads))

    def _compile(self) -> None:
        with _COMPILING:
            compiled = _compile(_SIGNATURE, self._function, self._cache)
            self._address = compiled.address
            prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
            self._entry = prototype(compiled.address)


class Call(NamedTuple):
    """One call of a kernel: its machine code, its arguments, its threads."""

    kernel: Kernel
    address: int
    frame: array.array[int]
    threads: int


@contextlib.contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    """Append the kernel calls of this thread to ``calls`` as they are made."""
    _local.calls = calls
    try:
        yield
    finally:
        _local.calls = None


def run_calls(calls: Sequence[Call]) -> Callable[[], None]:
    """Return a function that makes the calls again, one after the other, on threads that are started once."""
    start = _openmp()
    if start is None:
        kept = list(calls)

        def run_apart() -> None:
            for call in kept:
                call.kernel.run(call.frame, call.threads)

        return run_apart
    program = array.array("q", [len(calls)])
    for call in calls:
        program.extend((call.address, call.frame.buffer_info()[0], call.threads))
    address, threads = program.buffer_info()[0], max(call.threads for call in calls)
    entry = _program().address
    keep = (program, [call.frame for call in calls])

    def run(kept: Any = keep) -> None:
        start(entry, address, threads, 0)

    return run


def thread_count(tasks: int, nanoseconds: float) -> int:
    """Return how many threads pay for ``tasks`` tasks that take one thread ``nanoseconds`` in all."""
    if nanoseconds < 2 * WORTH_A_THREAD:
        return 1
    return max(1, min(torch.get_num_threads(), tasks, int(nanoseconds // WORTH_A_THREAD)))


def _compile(signature: Any, function: Callable[..., Any], cache: bool = True) -> Any:
    """Compile ``function`` to machine code, or read it from the cache on disk."""
    if not cache:
        return cfunc(signature, error_model="numpy")(function)
    previous = config.CACHE_DIR  # type: ignore[attr-defined]  # numba sets its settings at run time
    config.CACHE_DIR = str(_cache_directory())  # type: ignore[attr-defined]
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = previous  # type: ignore[attr-defined]


@functools.cache
def _cache_directory() -> Path:
    """Return a writable folder for compiled kernels, named after the sources they come from.

    Numba alone would look at the kernel's own file only and miss a change in a function that it calls.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(sys.version.encode())
    for source in sorted([*here.glob("*.py"), *here.glob("*/*.py")]):
        digest.update(source.read_bytes())
    try:
        home = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        wanted = Path(home) / "mambacus" / f"kernels-{digest.hexdigest()[:12]}"
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        warnings.warn(
            f"no folder to keep compiled kernels in ({error}): every process compiles them anew; "
            "set NUMBA_CACHE_DIR to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
        return Path(tempfile.mkdtemp(prefix="mambacus-kernels-"))


@functools.cache
def _openmp() -> Any:
    """Return ``GOMP_parallel`` of the OpenMP runtime that torch has loaded, or None where it has another kind."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no handle for the process as a whole
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return Python threads for platforms without GNU OpenMP; a kernel runs without the interpreter's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mambacus-kernel")


_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_team_size = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic
def _call(typing_context: Any, entry: Any, frame: Any, thread: Any, threads: Any) -> Any:
    """Call the kernel at the address ``entry``."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        word = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [word.as_pointer(), word, word])
        frame_pointer = builder.inttoptr(args[1], word.as_pointer())
        builder.call(builder.inttoptr(args[0], kernel.as_pointer()), [frame_pointer, *args[2:]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _run_share(p):  # type: ignore[no-untyped-def]
    _call(p[0], p[1], types.int64(_thread_number()), types.int64(_team_size()))


@functools.cache
def _team() -> Any:
    """Return the compiled function that every thread of the team enters."""
    return _compile(types.void(types.CPointer(types.int64)), _run_share)


_barrier = types.ExternalFunction("GOMP_barrier", types.void())


def _run_program(p):  # type: ignore[no-untyped-def]
    thread, team = types.int64(_thread_number()), types.int64(_team_size())
    for i in range(p[0]):
        threads = min(p[3 * i + 3], team)
        if thread < threads:
            _call(p[3 * i + 1], p[3 * i + 2], thread, threads)
        alone = threads == 1 and i + 1 < p[0] and p[3 * i + 6] == 1  # nobody waits for the next call
        if not alone:
            _barrier()


@functools.cache
def _program() -> Any:
    """Return the compiled function in which every thread of the team makes its part of all calls."""
    return _compile(types.void(types.CPointer(types.int64)), _run_program)
