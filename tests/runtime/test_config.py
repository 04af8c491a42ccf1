"""Flag > YAML > default, and every fault named."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mambacus.runtime.config import check, opt, parse
from mambacus.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = opt(help="files", positional=True)
    out: Path = opt(help="where")
    rate: float = opt(0.5, "1/s")
    steps: int = opt(10, "count", least=1)
    names: tuple[str, ...] = opt((), "list")
    limit: int | None = opt(None, "maximum")
    fast: bool = opt(False, "switch")
    mode: str = opt("a", "mode", choices=("a", "b"))
    share: float = opt(0.5, "share", least=0, below=1)
    sizes: tuple[int, ...] = opt((1,), "list", above=0, most=9)


def parsed(*argv: str) -> Config:
    return parse(Config, argv, "prog", "test")


def test_flags_override_yaml_which_overrides_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 2\nsteps: 7\nnames: [x, y]\nlimit: 3\nfast: true\nout: from-yaml\n")
    config = parsed("in1", "in2", "-c", str(file), "--steps", "9", "--no-fast")
    assert config == Config(("in1", "in2"), Path("from-yaml"), 2.0, 9, ("x", "y"), 3, False, "a")


def test_defaults_and_types():
    config = parsed("in", "--out", "o", "--names", "p,q", "--rate", "1e-3", "--fast")
    assert config == Config(("in",), Path("o"), 1e-3, 10, ("p", "q"), None, True, "a")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("rat: 1", "unknown key 'rat'; did you mean 'rate'"),
        ("steps: many", "key 'steps': expected int, got 'many'"),
        ("steps: 1.5", "key 'steps': expected int, got 1.5"),
        ("fast: 1", "key 'fast': expected bool, got 1"),
        ("- a\n- b", "expected keys and values, got a list"),
        ("a: [", "not valid YAML"),
        ("", "expected keys and values, got an empty file"),
        ("rate: null", "key 'rate': expected float, got None"),
        ("names: [x, null]", "key 'names': expected str"),
        ("out: ''", "key 'out': expected Path, got ''"),
        ("rate: 1\nrate: 2", "not valid YAML: found the key 'rate' twice"),
        ("a: " + "[" * 1000, "nested too deeply"),
    ],
)
def test_yaml_faults_are_named(tmp_path, yaml, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    with pytest.raises(UserError, match=re.escape(message)):
        parsed("in", "--out", "o", "-c", str(file))


def test_missing_fields_are_all_named():
    with pytest.raises(UserError, match="missing --out"):
        parsed("in")


def test_yaml_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        parsed("in", "-c", "nowhere.yaml")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        parsed("in", "-c", str(tmp_path))
    (tmp_path / "c.yaml").write_bytes("rate: 1".encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        parsed("in", "-c", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--mode", "c"), "--mode: expected one of a, b, got 'c'"),
        (("--mod", "a"), "unknown flag --mod; did you mean '--mode'"),
        (("--steps", "many"), "--steps: expected int, got 'many'"),
        (("--steps", "1.5"), "--steps: expected int, got '1.5'"),
        (("--steps", "0"), "--steps: expected 1 or more, got 0"),
        (("--rate", "nan"), "--rate: expected a finite number, got nan"),
        (("--rate", "inf"), "--rate: expected a finite number, got inf"),
        (("--share", "1"), "--share: expected 0 or more and less than 1, got 1.0"),
        (("--share", "nan"), "--share: expected 0 or more and less than 1, got nan"),
        (("--sizes", "4,0"), "--sizes: expected more than 0 and at most 9, got 0"),
        (("--sizes", "4,ten"), "--sizes: expected int, got 'ten'"),
        (("--names", ","), "--names: expected str,..., got ','"),
        (("--out", ""), "--out: expected Path, got ''"),
        (("--steps", "0", "--share", "2"), "--steps: expected 1 or more, got 0; --share: expected"),
        (("--mode",), "--mode: expected one argument"),
    ],
)
def test_flags_are_refused_in_one_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parsed("in", "--out", "o", *argv)
    assert "\n" not in str(caught.value)


def test_bounds_and_choices_hold_for_yaml_too(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("mode: c\nrate: .nan\nsizes: [3, 10]\n")
    with pytest.raises(UserError) as caught:
        parsed("in", "--out", "o", "-c", str(file))
    for part in ("--mode: expected one of a, b", "--rate: expected a finite number", "--sizes: expected more than 0"):
        assert part in str(caught.value)


def test_a_check_names_the_callers_faults_too():
    config = Config(("in",), Path("o"), steps=0)
    with pytest.raises(UserError, match=r"^recipe x: --steps: expected 1 or more, got 0; and so on$"):
        check(config, "and so on", where="recipe x")
    check(dataclasses.replace(config, steps=1))


def test_home_and_marks_of_editors_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfout: ~/run\r\n")
    assert parsed("in", "-c", str(file)).out == tmp_path / "run"


def test_help_is_printed_and_ends(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    assert "--mode {a,b}" in capsys.readouterr().out
