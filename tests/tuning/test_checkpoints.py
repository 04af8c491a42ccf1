"""Checkpoints are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mambacus.runtime.errors import UserError
from mambacus.tuning.checkpoints import MARKER, newest_checkpoint, read_notes, write_checkpoint


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "rest").write_text("r")

    return write


def write_three(folder: Path) -> None:
    for step in (2, 9, 10):
        write_checkpoint(folder, step, {"seconds": step}, writer(f"w{step}"), keep=3)


def test_the_newest_is_found_by_number_and_keeps_its_notes(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    write_three(tmp_path)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert (newest / "weights").read_text() == "w10"
    assert read_notes(newest) == {"seconds": 10}


def test_old_ones_go(tmp_path: Path) -> None:
    write_three(tmp_path)
    write_checkpoint(tmp_path, 12, {}, writer("w12"), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]


def remove_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink()


def cut_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text('{"step": 10, "fi')


def cut_weights(checkpoint: Path) -> None:
    (checkpoint / "weights").write_text("w")


def remove_weights(checkpoint: Path) -> None:
    (checkpoint / "weights").unlink()


@pytest.mark.parametrize("damage", [remove_marker, cut_marker, cut_weights, remove_weights])
def test_a_half_written_one_is_passed_over_and_cleared_away(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_three(tmp_path)
    damage(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    write_checkpoint(tmp_path, 9, {}, writer("again"), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]
    assert (tmp_path / "checkpoint-9" / "weights").read_text() == "again"


def test_a_full_disk_leaves_the_previous_one_and_says_so(tmp_path: Path) -> None:
    write_three(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step 11.*No space left.*checkpoint-10"):
        write_checkpoint(tmp_path, 11, {}, fill)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_left_aside_is_overwritten(tmp_path: Path) -> None:
    aside = tmp_path / ".being-written"
    aside.mkdir()
    (aside / "weights").write_text("half")
    assert newest_checkpoint(tmp_path) is None
    written = write_checkpoint(tmp_path, 1, {}, writer("whole"))
    assert (written / "weights").read_text() == "whole"
    assert not aside.exists()
