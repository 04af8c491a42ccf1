"""The command line's frame: instant help, suggestions, one-line errors."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from mambacus import cli
from mambacus.runtime.errors import UserError


def test_help_names_every_verb_and_loads_no_torch():
    code = "import sys, mambacus.cli; mambacus.cli.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


def test_every_verb_has_its_module():
    for verb in cli.VERBS:
        assert importlib.util.find_spec(f"mambacus.{verb}") is not None, verb


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_help_loads_no_torch(verb):
    code = f"""
import sys, mambacus.cli
try:
    mambacus.cli.main(['{verb}', '--help'])
except SystemExit as stop:
    assert stop.code == 0
assert 'torch' not in sys.modules and 'transformers' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: mambacus " + verb in done.stdout


def test_unknown_verb_gets_a_suggestion(capsys):
    assert cli.main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err


def test_no_verb_prints_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: mambacus VERB" in capsys.readouterr().out


def test_user_errors_are_one_line(capsys, monkeypatch):
    def fail(_argv):
        raise UserError("--data: line 17 is broken")

    monkeypatch.setitem(sys.modules, "mambacus.finetune", types.SimpleNamespace(main=fail))
    monkeypatch.delenv("MAMBACUS_DEBUG", raising=False)
    assert cli.main(["finetune"]) == 2
    assert capsys.readouterr().err == "mambacus finetune: error: --data: line 17 is broken\n"


def test_our_own_faults_keep_their_traceback(monkeypatch):
    def fail(_argv):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "mambacus.finetune", types.SimpleNamespace(main=fail))
    with pytest.raises(ZeroDivisionError):
        cli.main(["finetune"])


def test_a_message_of_several_lines_becomes_one(capsys, monkeypatch):
    def fail(_argv):
        raise UserError("the library says:\n  this\n  and that")

    monkeypatch.setitem(sys.modules, "mambacus.finetune", types.SimpleNamespace(main=fail))
    monkeypatch.delenv("MAMBACUS_DEBUG", raising=False)
    assert cli.main(["finetune"]) == 2
    assert capsys.readouterr().err == "mambacus finetune: error: the library says: this and that\n"


def test_a_path_that_no_check_foresaw_is_one_line(capsys, monkeypatch):
    def fail(_argv):
        Path("/nowhere/x" + "y" * 300).read_text()

    monkeypatch.setitem(sys.modules, "mambacus.finetune", types.SimpleNamespace(main=fail))
    monkeypatch.delenv("MAMBACUS_DEBUG", raising=False)
    assert cli.main(["finetune"]) == 2
    assert capsys.readouterr().err.startswith("mambacus finetune: error: /nowhere/xyy")
    monkeypatch.setenv("MAMBACUS_DEBUG", "1")
    with pytest.raises(OSError, match="nowhere"):
        cli.main(["finetune"])


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupt(_argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mambacus.finetune", types.SimpleNamespace(main=interrupt))
    assert cli.main(["finetune"]) == 130
    assert capsys.readouterr().err == "mambacus finetune: interrupted\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_who_leaves_is_no_fault(lines):
    # `mambacus info tiny | head -1`: the pipe closes while the verb writes, or when its last output is flushed
    code = f"""
import sys, types, mambacus.cli
sys.modules['mambacus.info'] = types.SimpleNamespace(main=lambda argv: print('line\\n' * {lines}))
sys.exit(mambacus.cli.main(['info']))
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 141


@pytest.mark.parametrize("busy", ["time.sleep(60)", "import slow"])
def test_ctrl_c_is_one_line_also_during_an_import(tmp_path, busy):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    code = f"""
import sys, time, types
import mambacus.cli
def work(argv):
    print("ready", flush=True)
    {busy}
sys.path.insert(0, {str(tmp_path)!r})
sys.argv = ["mambacus", "info"]
sys.modules["mambacus.info"] = types.SimpleNamespace(main=work)
sys.exit(mambacus.cli.main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if we run in the background
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # into the sleep
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.endswith("interrupted\n") and error.count("\n") == 1
