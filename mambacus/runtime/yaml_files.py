"""YAML files that hold keys and values, with every fault in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mambacus.runtime.errors import UserError


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
