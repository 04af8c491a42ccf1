"""One way from a frozen dataclass to a command line: flag > YAML > default.

A command declares a frozen dataclass whose fields are made by `opt`; `parse` turns ``argv`` into an instance. Each
default has one home (the dataclass), each help text says the unit, and unknown YAML keys are errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mambacus.runtime.errors import UserError, suggest

ConfigT = TypeVar("ConfigT")


def opt(
    default: Any = dataclasses.MISSING,
    help: str = "",  # the name argparse uses
    *,
    choices: Sequence[str] | None = None,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare one field of a command's configuration.

    Args:
        default: value when neither flag nor YAML gives one; without it the field is required.
        help: one line for ``--help``, with the unit.
        choices: the allowed strings.
        positional: take the value from the command line's bare words (a tuple field takes all of them).
        metavar: placeholder in ``--help``.
    """
    metadata = {"help": help, "choices": choices, "positional": positional, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str) -> ConfigT:
    """Build ``config_class`` from the command line and an optional YAML file (``-c``).

    Raises:
        UserError: unknown YAML key, value of the wrong type, missing required field.
        SystemExit: ``--help`` (0) or an argument argparse refuses (2).
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE.yaml", help="YAML file with the same keys as the flags"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    for field in fields:
        _add_argument(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))
    if given.pop("debug"):
        os.environ["MAMBACUS_DEBUG"] = "1"
    config_path = given.pop("config")
    values = _read_yaml(config_path, hints) if config_path else {}
    flags = {name: value for name, value in given.items() if value is not _UNSET}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    missing = [
        f.metadata["metavar"] or f.name if f.metadata["positional"] else "--" + f.name.replace("_", "-")
        for f in fields
        if f.name not in values and f.default is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"missing {', '.join(missing)} (see {prog} --help)")
    return config_class(**values)


_UNSET: Any = object()


class _HelpFormatter(argparse.HelpFormatter):
    """Argparse's formatter with room for the flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    base, is_tuple = _base_type(hint)
    text = field.metadata.get("help", "")
    if field.default not in (dataclasses.MISSING, None, (), ""):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default: {shown})"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": _UNSET}
    if field.metadata.get("positional"):
        options |= {
            "type": base,
            "nargs": "*" if is_tuple else "?",
            "metavar": field.metadata.get("metavar") or field.name.upper(),
        }
        parser.add_argument(field.name, **options)
        return
    if base is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif is_tuple:
        options |= {
            "type": lambda text: tuple(base(part) for part in text.split(",") if part),
            "metavar": f"{base.__name__.upper()},...",
        }
    else:
        options |= {"type": base, "metavar": None if field.metadata.get("choices") else base.__name__.upper()}
    if field.metadata.get("choices"):
        options["choices"] = field.metadata["choices"]
    if field.metadata.get("metavar"):
        options["metavar"] = field.metadata["metavar"]
    parser.add_argument("--" + field.name.replace("_", "-"), dest=field.name, **options)


def _base_type(hint: Any) -> tuple[Any, bool]:
    """Return (scalar type, is it a tuple of them) of ``int``, ``int | None``, ``tuple[int, ...]``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _read_yaml(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"--config: no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config: {path}: expected keys and values, got a {type(loaded).__name__}")
    return from_mapping(loaded, hints, str(path))


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
        base, is_tuple = _base_type(hints[key])
        try:
            if value is None:
                result[key] = None
            elif is_tuple:
                parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
                result[key] = tuple(_convert(part, base) for part in parts)
            else:
                result[key] = _convert(value, base)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: key {raw_key!r}: expected {getattr(base, '__name__', base)}, got {value!r}"
            ) from None
    return result


def _convert(value: Any, base: Any) -> Any:
    if base is bool and not isinstance(value, bool):
        raise TypeError
    if base in (int, float) and isinstance(value, bool):
        raise TypeError
    if base is int and isinstance(value, float) and value != int(value):
        raise ValueError
    if base is str and not isinstance(value, (str, int, float)):
        raise TypeError
    return value if base is Any else base(value)
