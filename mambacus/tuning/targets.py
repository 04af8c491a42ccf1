"""Which modules an adapter goes on: names, paths, regular expressions and ``all-linear``, each checked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from mambacus.runtime.errors import UserError, suggest

ALL_LINEAR = "all-linear"


def adaptable(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that are of one of ``kinds``, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def resolve_targets(model: nn.Module, targets: Iterable[str], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Return what stands for ``targets`` in an adapter's configuration: last names where they say all, else paths.

    Args:
        model: a plain model.
        targets: each the last part of module names (``in_proj``), a path (``backbone.layers.0.mixer.in_proj``), a
            regular expression that matches whole paths, or ``all-linear`` (every linear layer but the output head).
        kinds: the classes of modules that the method can adapt.

    Raises:
        UserError: there is no target, or one that matches nothing the method can adapt; all are named with what exists.
    """
    possible = adaptable(model, kinds)
    every = dict(model.named_modules())
    names = sorted({_last(path) for path in possible})
    found: set[str] = set()
    faults = []
    targets = list(targets)
    if not targets:
        raise UserError(f"--targets: expected at least one of {', '.join(names)}")
    for target in targets:
        if target == ALL_LINEAR:
            matched = {p for p, m in possible.items() if isinstance(m, nn.Linear) and _last(p) != "lm_head"}
        else:
            pattern = _pattern(target)
            matched = {p for p in possible if _last(p) == target or (pattern and pattern.fullmatch(p))}
            if not matched:
                faults.append(_fault(target, pattern, every, names))
        found |= matched
    if faults:
        raise UserError(f"--targets: {'; '.join(faults)}; this method can go on {', '.join(names)} or {ALL_LINEAR}")
    whole = [name for name in names if all(path in found for path in possible if _last(path) == name)]
    return sorted([*whole, *(path for path in found if _last(path) not in whole)])


def _pattern(target: str) -> re.Pattern[str] | None:
    try:
        return re.compile(target)
    except re.error:
        return None


def _fault(target: str, pattern: re.Pattern[str] | None, every: dict[str, nn.Module], names: list[str]) -> str:
    if pattern is None:
        return f"{target!r} is neither a module nor a regular expression"
    others = {type(m).__name__ for p, m in every.items() if p and (_last(p) == target or pattern.fullmatch(p))}
    if others:
        return f"{target!r} is a {' and a '.join(sorted(others))}, which this method cannot adapt"
    return f"{target!r} matches no module{suggest(target, [*names, ALL_LINEAR])}"


def _last(path: str) -> str:
    return path.rpartition(".")[2]
