"""The space of prompts: frames, separators, instructions, sets and orders of worked examples; drawing and editing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mambacus.prompts.prompt import SLOT, Exemplar, Prompt
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.yaml_files import read_mapping

_LISTS = ("frames", "separators", "instructions", "shots", "paraphrases")


@dataclasses.dataclass(frozen=True)
class Space:
    """What prompts are made of.

    Attributes:
        frames: texts with ``{question}`` once.
        separators: between the parts.
        instructions: at the beginning; an empty one for none.
        shots: numbers of worked examples that `draw` chooses from; edits stay between the least and the largest.
        paraphrases: groups of phrases that may stand for each other in an instruction.
        pool: worked examples to choose from.
    """

    frames: tuple[str, ...]
    separators: tuple[str, ...]
    instructions: tuple[str, ...]
    shots: tuple[int, ...]
    paraphrases: tuple[tuple[str, ...], ...]
    pool: tuple[Exemplar, ...]

    def draw(self, chance: random.Random) -> Prompt:
        """Return a random prompt: every part drawn by itself."""
        shots = min(chance.choice(self.shots), len(self.pool))
        return Prompt(
            question=chance.choice(self.frames),
            instruction=chance.choice(self.instructions),
            separator=chance.choice(self.separators),
            exemplars=tuple(chance.sample(self.pool, shots)),
        )

    def holds(self, prompt: Prompt) -> bool:
        """Whether ``prompt`` shows no fewer and no more examples than allowed, as far as the pool has them."""
        return min(min(self.shots), len(self.pool)) <= len(prompt.exemplars) <= max(self.shots)

    def edit(self, prompt: Prompt, chance: random.Random, attempts: int = 20) -> tuple[str, Prompt] | None:
        """Return a random edit of ``prompt`` and the operator's name; None if no operator changes it."""
        for _ in range(attempts):
            name = chance.choice(tuple(OPERATORS))
            edited = OPERATORS[name](self, prompt, chance)
            if edited is not None and edited != prompt:
                return name, edited
        return None


Operator = Callable[[Space, Prompt, random.Random], Prompt | None]


def _add(space: Space, prompt: Prompt, chance: random.Random) -> Prompt | None:
    """Show one more example, at any place."""
    left = [example for example in space.pool if example not in prompt.exemplars]
    if not left or len(prompt.exemplars) >= max(space.shots):
        return None
    place = chance.randint(0, len(prompt.exemplars))
    shown = (*prompt.exemplars[:place], chance.choice(left), *prompt.exemplars[place:])
    return dataclasses.replace(prompt, exemplars=shown)


def _delete(space: Space, prompt: Prompt, chance: random.Random) -> Prompt | None:
    """Leave one example out."""
    if not prompt.exemplars or len(prompt.exemplars) <= min(space.shots):
        return None
    place = chance.randrange(len(prompt.exemplars))
    return dataclasses.replace(prompt, exemplars=prompt.exemplars[:place] + prompt.exemplars[place + 1 :])


def _exchange(space: Space, prompt: Prompt, chance: random.Random) -> Prompt | None:
    """Put another example in the place of one."""
    left = [example for example in space.pool if example not in prompt.exemplars]
    if not left or not prompt.exemplars:
        return None
    shown = list(prompt.exemplars)
    shown[chance.randrange(len(shown))] = chance.choice(left)
    return dataclasses.replace(prompt, exemplars=tuple(shown))


def _swap(space: Space, prompt: Prompt, chance: random.Random) -> Prompt | None:
    """Let two examples change places."""
    if len(prompt.exemplars) < 2:
        return None
    shown = list(prompt.exemplars)
    one, two = chance.sample(range(len(shown)), 2)
    shown[one], shown[two] = shown[two], shown[one]
    return dataclasses.replace(prompt, exemplars=tuple(shown))


def _paraphrase(space: Space, prompt: Prompt, chance: random.Random) -> Prompt | None:
    """Say a phrase of the instruction in another way of its group."""
    found = [(phrase, group) for group in space.paraphrases for phrase in group if phrase in prompt.instruction]
    if not found:
        return None
    phrase, group = chance.choice(found)
    other = chance.choice([text for text in group if text != phrase])
    return dataclasses.replace(prompt, instruction=prompt.instruction.replace(phrase, other, 1))


def _instruct(space: Space, prompt: Prompt, chance: random.Random) -> Prompt:
    """Give another instruction, or none."""
    return dataclasses.replace(prompt, instruction=chance.choice(space.instructions))


def _frame(space: Space, prompt: Prompt, chance: random.Random) -> Prompt:
    """Put questions in another frame."""
    return dataclasses.replace(prompt, question=chance.choice(space.frames))


def _separate(space: Space, prompt: Prompt, chance: random.Random) -> Prompt:
    """Separate the parts by another text."""
    return dataclasses.replace(prompt, separator=chance.choice(space.separators))


OPERATORS: Mapping[str, Operator] = {
    "add": _add,
    "delete": _delete,
    "exchange": _exchange,
    "swap": _swap,
    "paraphrase": _paraphrase,
    "instruction": _instruct,
    "frame": _frame,
    "separator": _separate,
}


def load_space(
    path: Path | None, pool: Sequence[Exemplar], *, shots: Sequence[int] = (), flag: str = "--space"
) -> Space:
    """Return the built-in space, with the lists of a YAML file added to it.

    Args:
        path: a file with any of the keys of ``space.yaml``, or None.
        pool: worked examples to choose from.
        shots: numbers of worked examples in place of those of the files.
        flag: where the user named the file.

    Raises:
        UserError: an unknown key, a value of another type, a frame without ``{question}``, or an empty list.
    """
    found: dict[str, list[Any]] = {name: [] for name in _LISTS}
    files: list[tuple[str, Mapping[str, Any]]] = []
    builtin = True
    if path is not None:
        own = read_mapping(path, flag)
        builtin = own.pop("builtin", True)
        if not isinstance(builtin, bool):
            raise UserError(f"{flag} {path}: builtin: expected true or false, got {builtin!r}")
        files.append((f"{flag} {path}", own))
    if builtin:
        with resources.as_file(resources.files("mambacus.prompts") / "space.yaml") as file:
            files.insert(0, ("space.yaml", read_mapping(file, "space.yaml")))
    for where, values in files:
        for key, value in values.items():
            if key not in _LISTS:
                raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), (*_LISTS, 'builtin'))}")
            _check(value, key, where)
            found[key] += value
    found["shots"] = list(shots) or found["shots"]
    for name in ("separators", "instructions"):  # without a choice there is still one way to do it
        found[name] = found[name] or [{"separators": "\n\n", "instructions": ""}[name]]
    for name in ("frames", "shots"):
        if not found[name]:
            raise UserError(f"{flag} {path}: {name}: expected at least one")
    unique = {name: tuple(dict.fromkeys(map(_frozen, found[name]))) for name in _LISTS}
    return Space(**unique, pool=tuple(pool))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(value: Any, key: str, where: str) -> None:
    """Refuse a list of a space whose elements are not what ``key`` needs."""
    if not isinstance(value, list):
        raise UserError(f"{where}: {key}: expected a list, got {value!r}")
    for element in value:
        if key == "shots":
            good = isinstance(element, int) and not isinstance(element, bool) and element >= 0
            expected = "numbers of examples, 0 or more"
        elif key == "paraphrases":
            good = isinstance(element, list) and all(isinstance(p, str) and p for p in element) and len({*element}) > 1
            expected = "lists of two or more different phrases"
        elif key == "frames":
            good, expected = isinstance(element, str) and element.count(SLOT) == 1, f"texts with {SLOT} once"
        else:
            good, expected = isinstance(element, str), "texts"
        if not good:
            raise UserError(f"{where}: {key}: expected {expected}, got {element!r}")
