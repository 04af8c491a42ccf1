"""YAML files that hold keys and values, with every fault in one line."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mambacus.runtime.errors import UserError, suggest


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of ``node``."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"found the key {key.value!r} twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Args:
        path: the file.
        what: what the user knows it as, which messages begin with.

    Raises:
        UserError: it cannot be read, is not UTF-8 or not YAML, gives a key twice, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark, which some editors write, is not content
    except FileNotFoundError:
        raise UserError(f"{what}: no such file: {path}") from None
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what}: {path} is not valid YAML: it is not UTF-8 text") from None
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{what}: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{what}: {path} is not valid YAML: nested too deeply") from None
    if not isinstance(loaded, dict):
        got = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(f"{what}: {path}: expected keys and values, got {got}")
    return loaded


def names_in(folder: Traversable) -> list[str]:
    """Return the names of the YAML files of a folder of the package, without their ending."""
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_named(name: str, folder: Traversable, what: str) -> tuple[str, dict[str, Any]]:
    """Return the stem and the content of a YAML file, or of one that ships with the package, by its bare name.

    Args:
        name: a path with the ending ``.yaml`` or ``.yml`` or of a file that is there, else a name in ``folder``.
        folder: of the package.
        what: what the user knows it as.

    Raises:
        UserError: no such file or name, and as `read_mapping`.
    """
    path, known = Path(name), names_in(folder)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"no such {what}: {name} (packaged ones, by name: {', '.join(known)})")
        return path.stem, read_mapping(path, what)
    if name not in known:
        raise UserError(
            f"no such {what}: {name!r}; expected a .yaml file or one of {', '.join(known)}{suggest(name, known)}"
        )
    with resources.as_file(folder / f"{name}.yaml") as packaged:
        return name, read_mapping(packaged, what)


def mapping_of(value: Any, where: str) -> dict[str, Any]:
    """Return a part of a file that must be keys and values.

    Raises:
        UserError: it is something else; the message begins with ``where``.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {value!r}")
    return value


def list_of(loaded: dict[str, Any], key: str, where: str) -> list[Any]:
    """Return the list under a key; one left out or left empty has no entries.

    Raises:
        UserError: it is something else; the message begins with ``where``.
    """
    value = loaded.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"{where}: {key}: expected a list, got {value!r}")
    return value
