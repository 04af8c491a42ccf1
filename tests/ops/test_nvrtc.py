"""Compiled kernels are kept on disk, whole or not at all, and a disk that takes none stops nothing."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mambacus.ops import nvrtc
from mambacus.ops.nvrtc import Program, machine_code

PROGRAM = Program("source", ("A=1",), 0)


class FakeNvrtc:
    def nvrtcVersion(self, major: object, minor: object) -> int:  # noqa: N802 -- the library's name
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Compile nothing: the sources in the order they came."""
    sources: list[str] = []

    def compile_(source: str, options: list[str]) -> bytes:
        sources.append(source)
        return source.encode() * 1000

    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(nvrtc, "_nvrtc", FakeNvrtc)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc._print_once.cache_clear()
    return sources


def test_compiles_once_and_says_so(compiled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_code(PROGRAM) == machine_code(PROGRAM) == b"source" * 1000
    assert machine_code(Program("other", (), 0)) == b"other" * 1000
    assert compiled == ["source", "other"]
    assert capsys.readouterr().err.count("compiling CUDA kernels for this GPU") == 1
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".cubin", ".cubin"]


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_file_is_made_anew(compiled: list[str], tmp_path: Path, damage: bytes | None) -> None:
    code = machine_code(PROGRAM)
    [path] = tmp_path.rglob("*.cubin")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert machine_code(PROGRAM) == code and path.read_bytes() == whole
    assert len(compiled) == 2


class SlowText(io.StringIO):
    """Gives other threads time to come in between."""

    def write(self, text: str) -> int:
        time.sleep(0.01)
        return super().write(text)


def test_threads_do_not_write_into_each_others_files(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together, moved, said = threading.Barrier(8, timeout=60), [], SlowText()
    replace = os.replace

    def note(source: str, target: Path) -> None:
        moved.append(str(source))
        replace(source, target)

    def work() -> None:
        together.wait()
        machine_code(PROGRAM)

    def compile_(source: str, options: list[str]) -> bytes:
        together.wait()  # so that all find nothing kept
        return source.encode() * 1000

    monkeypatch.setattr(os, "replace", note)
    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(sys, "stderr", said)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert nvrtc._kept(path) == b"source" * 1000
    assert len(set(moved)) == len(moved) == 8
    assert said.getvalue().count("mambacus: ") == 1, said.getvalue()


def test_a_folder_that_takes_nothing_is_said_and_survived(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mambacus").write_text("a file where a folder should be")
    assert machine_code(PROGRAM) == machine_code(PROGRAM) == b"source" * 1000
    assert capsys.readouterr().err.count("compiled kernels are not kept in") == 1
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert machine_code(PROGRAM) == b"source" * 1000
    assert "no home folder; set XDG_CACHE_HOME" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="an administrator may read everything")
def test_a_home_that_may_not_be_read(compiled: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        assert machine_code(PROGRAM) == b"source" * 1000
    finally:
        tmp_path.chmod(0o700)
