"""One way from a frozen dataclass to a command line: flag > YAML > default.

A command declares a frozen dataclass whose fields are made by `opt`; `parse` turns ``argv`` into an instance. Each
default has one home (the dataclass), each help text says the unit, and what is unknown or out of range is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.yaml_files import read_mapping

ConfigT = TypeVar("ConfigT")
Whole = typing.NewType("Whole", str)  # text that may hold commas: a tuple of it takes one value from each use of a flag
MOST_SEED = 2**32 - 1  # numpy takes no larger seed


def opt(
    default: Any = dataclasses.MISSING,
    help: str = "",  # the name argparse uses
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare one field of a command's configuration.

    Of a tuple field, choices and bounds hold for every element; None is always within them.

    Args:
        default: value when neither flag nor YAML gives one; without it the field is required.
        help: one line for ``--help``, with the unit.
        choices: the allowed strings.
        least: smallest allowed number.
        above: the number must be larger than this.
        most: largest allowed number.
        below: the number must be smaller than this.
        positional: take the value from the command line's bare words (a tuple field takes all of them).
        metavar: placeholder in ``--help``.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"help": help, "choices": choices, "positional": positional, "metavar": metavar, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, *faults: str, where: str = "") -> None:
    """Refuse a configuration with a value that its field's `opt` does not allow, or with faults the caller found.

    Args:
        config: an instance of a command's dataclass.
        faults: what else is wrong, one clause each.
        where: what the message begins with, for example the recipe that the values come from.

    Raises:
        UserError: naming all faults at once.
    """
    found = [
        fault for field in dataclasses.fields(config) for fault in _field_faults(field, getattr(config, field.name))
    ]
    if found or faults:
        raise UserError((f"{where}: " if where else "") + "; ".join((*found, *faults)))


def _field_faults(field: dataclasses.Field[Any], value: Any) -> list[str]:
    faults = []
    for part in value if isinstance(value, tuple) else (value,):
        expected = None if part is None else _expected(field.metadata, part)
        if expected:
            hint = suggest(part, field.metadata["choices"]) if isinstance(part, str) else ""
            faults.append(f"{_flag(field)}: expected {expected}, got {part!r}{hint}")
    return faults


def _expected(allowed: Mapping[str, Any], value: Any) -> str | None:
    """Return what was expected where ``value`` is not it, else None."""
    if allowed.get("choices"):
        return None if value in allowed["choices"] else f"one of {', '.join(allowed['choices'])}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    least, above, most, below = (allowed.get(name) for name in ("least", "above", "most", "below"))
    bounds = [
        text
        for bound, text in (
            (least, f"{least} or more"), (above, f"more than {above}"), (most, f"at most {most}"),
            (below, f"less than {below}"),
        )
        if bound is not None
    ]  # fmt: skip
    within = (
        math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    return None if within else " and ".join(bounds) or "a finite number"


def _flag(field: dataclasses.Field[Any]) -> str:
    """Return the name by which the user knows a field: its flag, or the word in ``--help`` of a positional one."""
    if field.metadata.get("positional"):
        return str(field.metadata.get("metavar") or field.name.upper())
    return "--" + field.name.replace("_", "-")


def parse(config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str) -> ConfigT:
    """Build ``config_class`` from the command line and an optional YAML file (``-c``).

    Raises:
        UserError: unknown flag or YAML key, a value of the wrong type or out of range, missing required field.
        SystemExit: ``--help`` was asked for and printed.
    """
    parser = _Parser(prog=prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE.yaml", help="YAML file with the same keys as the flags"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    for field in fields:
        _add_argument(parser, field, hints[field.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse(unknown)
    given = vars(known)
    if given.pop("debug"):
        os.environ["MAMBACUS_DEBUG"] = "1"
    config_path = given.pop("config")
    values = from_mapping(read_mapping(config_path, "--config"), hints, str(config_path)) if config_path else {}
    flags = {name: value for name, value in given.items() if value is not _UNSET}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    positional = [f for f in fields if f.metadata.get("positional") and f.name in values]
    if faults := [fault for f in positional for fault in _field_faults(f, values[f.name])]:
        raise UserError("; ".join(faults))  # before flags are missed: which are needed may hang on it
    missing = [_flag(f) for f in fields if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"missing {', '.join(missing)} (see {prog} --help)")
    config = config_class(**values)
    check(config)
    return config


_UNSET: Any = object()


class _Parser(argparse.ArgumentParser):
    """Argparse's parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raise for words that no argument took."""
        flags = [word for word in words if word.startswith("-")]
        if flags:
            hint = suggest(flags[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown flag {', '.join(flags)}{hint}")
        self.error(f"unexpected {', '.join(map(repr, words))}")


class _Append(argparse.Action):
    """Keeps the values of all uses of a flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add one."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is _UNSET else before), values])


class _HelpFormatter(argparse.HelpFormatter):
    """Argparse's formatter with room for the flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    base, is_tuple, _ = _base_type(hint)
    about = field.metadata
    text = about.get("help", "")
    if field.default not in (dataclasses.MISSING, None, (), ""):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default: {shown})"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": _UNSET}
    convert = functools.partial(_from_text, base=base)
    if about.get("positional"):
        options |= {"type": convert, "nargs": "*" if is_tuple else "?", "metavar": _flag(field)}
        parser.add_argument(field.name, **options)
        return
    if base is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif is_tuple and base is Whole:
        options |= {"type": str, "action": _Append}
    elif is_tuple:
        options |= {"type": functools.partial(_tuple_from_text, base=base), "metavar": f"{base.__name__.upper()},..."}
    elif about.get("choices"):
        options |= {"type": convert, "metavar": "{" + ",".join(about["choices"]) + "}"}
    else:
        options |= {"type": convert, "metavar": base.__name__.upper()}
    if about.get("metavar"):
        options["metavar"] = about["metavar"]
    parser.add_argument(_flag(field), dest=field.name, **options)


def _from_text(text: str, base: Any) -> Any:
    try:
        return _convert(text, base)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected {base.__name__}, got {text!r}") from None


def _tuple_from_text(text: str, base: Any) -> tuple[Any, ...]:
    parts = [part for part in text.split(",") if part]
    if not parts:
        raise argparse.ArgumentTypeError(f"expected {base.__name__},..., got {text!r}")
    return tuple(_from_text(part, base) for part in parts)


def _base_type(hint: Any) -> tuple[Any, bool, bool]:
    """Return scalar type, is it a tuple of them, may it be None; of ``int``, ``int | None``, ``tuple[int, ...]``."""
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        optional = type(None) in typing.get_args(hint)
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def from_mapping(values: dict[str, Any], hints: dict[str, Any], where: str) -> dict[str, Any]:
    """Check and convert a mapping (from YAML) to the field types in ``hints``; keys may use ``-`` for ``_``.

    Raises:
        UserError: unknown key (with a suggestion) or a value of the wrong type, naming ``where``.
    """
    result: dict[str, Any] = {}
    for raw_key, value in values.items():
        key = str(raw_key).replace("-", "_")
        if key not in hints:
            raise UserError(f"{where}: unknown key {raw_key!r}{suggest(key, hints)}")
        base, is_tuple, optional = _base_type(hints[key])
        try:
            if value is None and optional:
                result[key] = None
            elif is_tuple:
                splits = isinstance(value, str) and base is not Whole
                parts = value.split(",") if splits else value if isinstance(value, list) else [value]
                result[key] = tuple(_convert(part, base) for part in parts)
            else:
                result[key] = _convert(value, base)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: key {raw_key!r}: expected {getattr(base, '__name__', base)}, got {value!r}"
            ) from None
    return result


def _convert(value: Any, base: Any) -> Any:
    """Return ``value`` as a ``base``.

    Raises:
        TypeError: its type says that something else was meant.
        ValueError: it is no such value.
    """
    base = str if base is Whole else base
    if value is None or (base is bool and not isinstance(value, bool)):
        raise TypeError
    if base in (int, float) and isinstance(value, bool):
        raise TypeError
    if base is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if base is str and not isinstance(value, (str, int, float)):
        raise TypeError
    if base is Path:
        return _path(value)
    return value if base is Any else base(value)


def _path(text: Any) -> Path:
    """Return a path; ``~`` is the home folder also where no shell has seen it."""
    if not text:
        raise ValueError("an empty name would be the working folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody: pathlib's word for an unknown user
        raise ValueError(f"no home folder for {text}") from None
