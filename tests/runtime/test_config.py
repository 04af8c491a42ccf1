"""Flag > YAML > default, and every fault named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = opt(help="files", positional=True)
    out: Path = opt(help="where")
    rate: float = opt(0.5, "1/s")
    steps: int = opt(10, "count")
    names: tuple[str, ...] = opt((), "list")
    limit: int | None = opt(None, "maximum")
    fast: bool = opt(False, "switch")
    mode: str = opt("a", "mode", choices=("a", "b"))


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
    ],
)
def test_yaml_faults_are_named(tmp_path, yaml, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        parsed("in", "--out", "o", "-c", str(file))


def test_missing_fields_are_all_named():
    with pytest.raises(UserError, match="missing --out"):
        parsed("in")


def test_missing_yaml_file():
    with pytest.raises(UserError, match="no such file"):
        parsed("in", "-c", "nowhere.yaml")


def test_choices_and_unknown_flags_are_refused(capsys):
    for argv in (["in", "--out", "o", "--mode", "c"], ["in", "--out", "o", "--mod", "a"]):
        with pytest.raises(SystemExit) as stop:
            parsed(*argv)
        assert stop.value.code == 2
