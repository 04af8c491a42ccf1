"""Programs a model wrote: what they answer, and thirty-odd that try to get out, each stopped by name."""

from __future__ import annotations

import dataclasses
import os
import struct
import sys
import time
from pathlib import Path

import psutil
import pytest

from mambacus.evals import sandbox, sandbox_worker
from mambacus.evals.sandbox import Limits, Outcome, program_in, run_program, run_programs
from mambacus.runtime.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are held by Linux's seccomp")
# Only the limit that a program is to meet is near: on a loaded machine no other may come first.
PATIENT = Limits(seconds=30, wall_seconds=180.0, bytes=256 * 2**20)
BUSY = dataclasses.replace(PATIENT, seconds=1)
ASLEEP = dataclasses.replace(PATIENT, wall_seconds=3.0)

# Gets at the real functions of this process where the names above them are watched: only the kernel can stop it.
POSIX = "import sys\nposix = sys.modules['posix']\n"

HOSTILE = {
    "infinite loop": ("while True: pass", "time", "CPU, SIGXCPU"),
    "sleep": ("import time\ntime.sleep(10 ** 6)", "time", "clock"),
    "big power": ("x = 7 ** (10 ** 9)\nprint(x % 10)", "time|memory", ""),
    "loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "time", "CPU, SIGXCPU",
    ),
    "10 GB list": ("x = [0] * (10 * 2 ** 30 // 8)", "memory", "MemoryError"),
    "growing list": ("x = []\nwhile True: x.append('y' * 10 ** 6 + str(len(x)))", "memory", "MemoryError"),
    "huge output": ("while True: print('x' * 10000)", "output", ""),
    "huge line": ("print('x' * 10 ** 8)", "output", ""),
    "huge error": ("raise ValueError('x' * 10 ** 7)", "error", "ValueError"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", "error", "RecursionError"),
    "stack overflow in C": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1)\nf(0)",
        "crash|memory|forbidden|time", "",
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", "forbidden", "os.fork"),
    "fork by another name": (POSIX + "posix.fork()", "forbidden", "os.fork"),
    "thread": ("import _thread\n_thread.start_new_thread(print, ())", "forbidden", "_thread.start_new|system call"),
    "multiprocessing": ("import multiprocessing", "forbidden", "import multiprocessing"),
    "subprocess": ("import subprocess\nsubprocess.run(['ls'])", "forbidden", "import subprocess"),
    "os.system": ("import os\nos.system('touch {canary}')", "forbidden", "os.system"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'touch {canary}'])", "forbidden", "os.exec"),
    "spawn": (POSIX + "posix.posix_spawn('/bin/sh', ['sh'], {{}})", "forbidden", "os.posix_spawn"),
    "file write": ("open('{canary}', 'w').write('x')", "forbidden", "open {canary}"),
    "file read": ("print(open('/etc/passwd').read())", "forbidden", "open /etc/passwd"),
    "file by number": (POSIX + "posix.open('{canary}', 64)", "forbidden", "open {canary}"),
    "file removed": (POSIX + "posix.remove('{victim}')", "forbidden", "os.remove"),
    "file renamed": (POSIX + "posix.rename('{victim}', '{canary}')", "forbidden", "os.rename"),
    "folder listed": ("import os\nprint(os.listdir('/'))", "forbidden", "os.listdir"),
    "working folder": (POSIX + "posix.chdir('/tmp')", "forbidden", "os.chdir|system call"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "forbidden", "import socket"),
    "socket beneath": ("import _socket\n_socket.socket()", "forbidden", "import _socket"),
    "web": ("import urllib.request", "forbidden", "import urllib"),
    "ctypes": ("import ctypes\nctypes.CDLL(None).system(b'touch {canary}')", "forbidden", "import ctypes"),
    "ctypes beneath": ("import _ctypes", "forbidden", "import _ctypes"),
    "import trick": ("__import__('subp' + 'rocess')", "forbidden", "import subprocess"),
    "importlib": ("import importlib\nimportlib.import_module('socket')", "forbidden", "import|open|os.|system call"),
    "found by its class": (
        "import io\nkinds = [k for c in io.IOBase.__base__.__subclasses__() for k in c.__subclasses__()]\n"
        "[k for k in kinds if k.__name__ == 'FileIO'][0]('{canary}', 'w')", "forbidden", "open {canary}",
    ),
    "signal handlers": ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)", "forbidden", "import signal"),
    "signal beneath": (
        "import sys\ns = sys.modules['_signal']\ns.signal(s.SIGALRM, lambda *a: None)", "forbidden", "system call",
    ),
    "kill the parent": (POSIX + "posix.kill(posix.getppid(), 9)", "forbidden", "os.kill|system call"),
    "kill everything": (POSIX + "posix.kill(-1, 9)", "forbidden", "os.kill"),
    "raise the limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "forbidden", "import"),
    "hook of its own": ("import sys\nsys.addaudithook(print)", "forbidden", "sys.addaudithook"),
    "collector": ("import gc\nprint(gc.get_objects())", "forbidden", "gc"),
    "environment": ("import os\nprint(sorted(os.environ))\nos.putenv('A', 'b')", "forbidden", "os.putenv"),
    "closed pipes": (POSIX + "posix.close(1)\nposix.close(2)", "error|forbidden", "verdict|system call"),
    "pipes closed, then asleep": (
        POSIX + "import time\nposix.close(1)\nposix.close(2)\ntime.sleep(10 ** 6)", "time", "",
    ),
    "false verdict": (POSIX + "posix.write(2, b'nonsense')\nposix._exit(0)", "error", "verdict"),
    "verdict of other forms": (
        POSIX + "posix.write(2, b'{{\"status\": [], \"detail\": 1, \"value\": {{}}}}')\nposix._exit(0)",
        "error", "verdict",
    ),
    "verdict without end": (POSIX + "posix.write(2, b'[' * 60000)\nposix._exit(0)", "error", "verdict"),
    "verdict that would end the run": (
        POSIX + "posix.write(2, b'{{\"status\": \"unavailable\", \"detail\": \"\", \"value\": null}}')\nposix._exit(0)",
        "unavailable", "",
    ),
    "name of the program in disguise": (
        "class Path(str):\n    def __eq__(self, other): return True\nopen(Path('{canary}'), 'w')", "forbidden", "open",
    ),
    "error that hangs": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", "time", "CPU, SIGXCPU",
    ),
    "regex without end": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "time", "CPU, SIGXCPU"),
    "finaliser": (
        "class F:\n    def __del__(self):\n        while True: pass\nf = F()\ndel f", "time", "CPU, SIGXCPU",
    ),
    "value that hangs": (
        "class V:\n    def __str__(self):\n        while True: pass\nanswer = V()", "time", "CPU, SIGXCPU",
    ),
    "thread of the interpreter": (
        "import sys\ng = sys._getframe()\nwhile g.f_back: g = g.f_back\n"
        "g.f_globals['ctypes'].CDLL(None).system(b'touch {canary}')", "forbidden", "ctypes|system call",
    ),
    "hook without its list": (
        POSIX + "import time\nm = sys.modules['__main__']\nclass All:\n    def __contains__(self, x): return True\n"
        "m.HARMLESS = All()\nposix.remove('{victim}')", "forbidden", "system call",
    ),
    "leaves early": (POSIX + "posix._exit(0)", "error", "verdict"),
}  # fmt: skip


def _limits(status: str, detail: str) -> Limits:
    """Return what a hostile program may use, by how it is to end."""
    if "time" not in status:
        return PATIENT
    return ASLEEP if detail == "clock" else BUSY


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path, Path]]:
    """All hostile programs, run at once, each with a file it must not make and one it must not touch."""
    places = {}
    for number, name in enumerate(HOSTILE):
        folder = tmp_path_factory.mktemp(f"hostile{number}")
        places[name] = (folder / "canary", folder / "victim")
        places[name][1].write_text("intact", encoding="utf-8")
    found = {}
    for limits in (ASLEEP, BUSY, PATIENT):
        names = [name for name, (_, status, detail) in HOSTILE.items() if limits is _limits(status, detail)]
        sources = [HOSTILE[name][0].format(canary=places[name][0], victim=places[name][1]) for name in names]
        found |= zip(names, run_programs(sources, limits), strict=True)
    return {name: (outcome, *places[name]) for name, outcome in found.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_stopped_by_name(name: str, outcomes: dict[str, tuple[Outcome, Path, Path]]) -> None:
    outcome, canary, victim = outcomes[name]
    _, status, detail = HOSTILE[name]
    assert outcome.status in status.split("|"), outcome
    assert any(part in outcome.detail for part in detail.format(canary=canary, victim=victim).split("|")), outcome
    assert outcome.answer is None
    assert not canary.exists()
    assert victim.read_text(encoding="utf-8") == "intact"


def test_nothing_of_them_is_left(outcomes: dict[str, tuple[Outcome, Path, Path]]) -> None:
    assert len(outcomes) >= 30
    time.sleep(0.1)
    running = [each.info for each in psutil.process_iter(["ppid", "cmdline"])]  # which may end meanwhile
    ours = [" ".join(each["cmdline"] or []) for each in running if each["ppid"] == os.getpid()]
    assert not [command for command in ours if "sandbox_worker" in command]


def test_the_kernel_stops_what_no_hook_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the audit hook taken out, the filter alone holds: no file, no process, no socket, no executable memory."""
    worker = tmp_path / "sandbox_worker.py"
    text = Path(sandbox._WORKER).read_text(encoding="utf-8")
    assert text.count("sys.addaudithook(hook)") == 1
    text = text.replace("sys.addaudithook(hook)", "pass").replace("sys.modules.pop(name, None)", "pass")
    worker.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sandbox, "_WORKER", worker)
    canary = tmp_path / "canary"
    libc = "import ctypes\nc = ctypes.CDLL(None)\n"
    bare = [
        f"{libc}c.system(b'touch {canary}')",
        f"{libc}c.fork()",
        f"{libc}c.socket(2, 1, 0)",
        f"{libc}c.kill(-1, 0)",
        f"{libc}c.prctl(22, 0, 0, 0, 0)",
        f"{libc}c.syscall(101, 0, 0, 0, 0)",  # ptrace
        f"{POSIX}posix.remove('{worker}')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        f"{libc}c.syscall(0x40000000 | 1, 1, b'x', 1)",  # write(2) of the x32 interface
        f"{libc}c.syscall(435, 0, 0)",  # clone3
        f"{libc}c.syscall(425, 8, 0)",  # io_uring_setup
        f"{libc}c.syscall(319, b'x', 0)",  # memfd_create
        f"{libc}c.personality(0x0400000)",  # READ_IMPLIES_EXEC
    ]
    for source, outcome in zip(bare, run_programs([f"# bare\n{each}" for each in bare], PATIENT), strict=True):
        assert (outcome.status, outcome.detail) == ("forbidden", "system call"), source
    code = f"# bare\n{libc}c.mmap.restype = ctypes.c_void_p\nprint(c.mmap(None, 4096, 7, 34, -1, 0) == 2 ** 64 - 1)"
    assert run_program(code, PATIENT) == Outcome("ok", "", "True")  # refused: MAP_FAILED
    advice = f"# bare\n{libc}print(c.madvise(None, 4096, 100), c.madvise(None, 0, 4))"  # MADV_HWPOISON, MADV_DONTNEED
    assert run_program(advice, PATIENT) == Outcome("ok", "", "-1 0")
    opened = f"# bare\n{libc}print(c.open(b'{canary}', 65, 0o600))"
    assert run_program(opened, PATIENT) == Outcome("ok", "", "-1")
    assert worker.exists() and not canary.exists()


def verdict_of(code: bytes, architecture: int, number: int, third: int) -> int:
    """Run a filter as the kernel does: classic BPF over struct seccomp_data."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, 0, 0, third, 0, 0, 0)
    steps = list(struct.iter_unpack("HBBI", code))
    at = value = 0
    while True:
        operation, if_true, if_false, operand = steps[at]
        at += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        else:
            holds = {0x15: value == operand, 0x25: value > operand, 0x45: bool(value & operand)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", sandbox_worker.ARCHITECTURES)
def test_every_number_but_the_listed_ones_dies(machine: str) -> None:
    architecture, numbers = sandbox_worker.ARCHITECTURES[machine]
    code = sandbox_worker._bpf(architecture, numbers)
    names = {number: name for name, number in numbers.items()}
    for number in range(1024):
        found = verdict_of(code, architecture, number, 0)
        allowed = sandbox_worker.DENY if names.get(number) in sandbox_worker.FAILS else sandbox_worker.ALLOW
        assert found == (allowed if number in names else sandbox_worker.KILL_PROCESS), (number, names.get(number))
        assert verdict_of(code, architecture, 0x40000000 | number, 0) == sandbox_worker.KILL_PROCESS  # x32
        assert verdict_of(code, 0x40000003, number, 0) == sandbox_worker.KILL_PROCESS  # i386, by int 0x80
    for name, third, expected in (
        ("mmap", 7, sandbox_worker.DENY), ("mprotect", 4, sandbox_worker.DENY), ("mmap", 3, sandbox_worker.ALLOW),
        ("madvise", 101, sandbox_worker.DENY), ("madvise", 4, sandbox_worker.ALLOW),
    ):  # fmt: skip
        assert verdict_of(code, architecture, numbers[name], third) == expected, (name, third)


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("print(6 * 7)", "42"),
        ("import sys\nprint('on the way', file=sys.stderr)\nprint(5)", "5"),
        ("pattern = '\\d'\nprint(5)", "5"),  # newer Pythons warn of it
        ("answer = chr(0xd800) + '5'", "?5"),
        ("print('1' * 3000)", "1" * 1000),
        ("print('first')\nprint('Total:', 5, 'dollars')\n", "Total: 5 dollars"),
        ("n0 = 5.0\nanswer = n0 / 2\nprint(answer)", "2.5"),
        ("total = 3\nanswer = total * 2", "6"),
        ("def simple_math_problem() -> float:\n    '''Text.'''\n    result = 60 * 0.25\n    return result\n", "15.0"),
        ("def helper(x):\n    return x\ndef solution():\n    return helper(4)\ndef last():\n    return 5", "4"),
        ("from fractions import Fraction\nanswer = Fraction(1, 3) + Fraction(1, 6)", "1/2"),
        ("import math, statistics, datetime\nprint(math.comb(5, 2), statistics.mean([1, 2]))", "10 1.5"),
        ("from datetime import datetime\nprint((datetime.strptime('2024-03-01', '%Y-%m-%d')).day)", "1"),
        ("import random\nrandom.seed(3)\nanswer = random.randint(5, 5)", "5"),
        ("from decimal import Decimal\nprint(Decimal('0.1') * 3)", "0.3"),
        ("if __name__ == '__main__':\n    print(3)", "3"),
        ("print(3); quit()", "3"),
        ("print(4)\nexit(1)", "4"),
        ("import array, calendar, json, pprint, textwrap\nprint(textwrap.dedent(' 7'))", "7"),
        ("print(8)\nexit_code = 0\nraise SystemExit", "8"),
        ("x = sum(i for i in range(10 ** 6))\nprint(x)", "499999500000"),
        ("price = 3", None),
        ("", None),
    ],
)
def test_programs_answer(source: str, answer: str | None) -> None:
    assert run_program(source, PATIENT) == Outcome("ok", "", answer)


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("print(1/0)", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("print(x)", "NameError: name 'x' is not defined"),
        ("import numpy", "import numpy"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E: a message that cannot be shown"),
        (
            "class M(type):\n    @property\n    def __name__(cls): raise SystemExit\n"
            "class E(Exception, metaclass=M): pass\nraise E('why')",
            "E: why",
        ),
    ],
)
def test_faults_of_a_program_are_named(source: str, detail: str) -> None:
    outcome = run_program(source, PATIENT)
    assert outcome.status == ("forbidden" if source == "import numpy" else "error"), outcome
    assert detail in outcome.detail and outcome.answer is None


def test_programs_inherit_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "word")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        assert run_program("import os\nprint(os.environ.get('SECRET'), len(os.environ) < 3)").answer == "None True"
        outcome = run_program(POSIX + f"print(posix.write({write}, b'x'))", PATIENT)
        assert "Bad file descriptor" in outcome.detail
    finally:
        os.close(read)
        os.close(write)


def test_a_very_long_program_is_not_run() -> None:
    assert run_program("x = 1\n" * 10_000).status == "too long"


def test_where_nothing_can_hold_them_none_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="Linux only"):
        sandbox.check_available()


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1\nprint(x)\n", "x = 1\nprint(x)\n"),
        ("x = 1\n```\n#### 1", "x = 1\n"),
        ("Let us compute.\n```python\nprint(2)\n```\nSo 2.", "print(2)\n"),
        ("```py\nprint(2)", "print(2)"),
    ],
)
def test_the_program_in_a_completion(completion: str, program: str) -> None:
    assert program_in(completion) == program
