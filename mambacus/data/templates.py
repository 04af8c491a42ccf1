"""Text templates with a plan: how a situation is told, and the steps of arithmetic that answer it.

A template is data, kept in ``texts/*.txt``, one paragraph each::

    # buy-then-give                                        its key
    {A} has {x} {i.s}. {A.He} [buys|gets] {y} more.        the story
    ? How many {i.s} does {A} have now?                    the question
    ~ {A} counts how many {i.s} {A.he} has now.            the same as a statement
    = x + y = t {i}                                        a step: equation, unit of the result
    ! In the end {A} has {t} {i.s}.                        the outcome
    x 4-80; y 3-50; i fruit small; x != y                  ranges, nouns (names of `lexicon.NOUNS`), unequal numbers

Slots are those of `str.format`: numbers, people (``{A}``, ``{A.he}``, ``{A.His}``), nouns (``{i}``, plural ``{i.s}``,
with its article ``{i.a}``); ``[buys|gets]`` is a choice of wordings. A step's operands are numbers of the text, results
of earlier steps or literals; it is shown as ``12 + 5 = 17 apples``. Word problems need the question, pre-training
stories the two statements; a template may serve both. Lines that start with ``//`` are comments.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import operator
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from mambacus.data.lexicon import NOUNS, Noun, counted, draw_people

MAX_RESULT = 200
MAX_FACTOR = 12
_ATTEMPTS = 20_000
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_STEP = re.compile(r"(?P<left>\w+) (?P<op>[-+*/]) (?P<right>\w+) = (?P<result>\w+) (?P<unit>.+)")
_RANGE = re.compile(r"(\w) (\d+)-(\d+)")
_NOUNS = re.compile(r"(\w) ([a-z ]+)")
_UNEQUAL = re.compile(r"(\w) != (\w)")
_CHOICE = re.compile(r"\[([^\[\]]+)\]")
_PERSON = re.compile(r"\{([ABC])[.}]")


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation of a plan: ``left op right = result unit``; operands are variable names or literals."""

    left: str
    op: str
    right: str
    result: str
    unit: str

    @classmethod
    def parse(cls, text: str) -> Step:
        """Read ``"x - y = rest apple"``.

        Raises:
            ValueError: the text is not a step.
        """
        match = _STEP.fullmatch(text)
        if match is None:
            raise ValueError(f"not a step: {text!r}")
        return cls(**match.groupdict())

    def apply(self, values: Mapping[str, int]) -> int | None:
        """Return the result, or None where a child would not be asked for it.

        That is a result outside 1 to `MAX_RESULT`, a quotient that is 1 or not an integer, or a product of two numbers
        above `MAX_FACTOR`.
        """
        left, right = operand(self.left, values), operand(self.right, values)
        if self.op == "/" and (right < 2 or left % right or left == right):
            return None
        if self.op == "*" and min(left, right) > MAX_FACTOR:
            return None
        result = _OPERATIONS[self.op](left, right)
        return result if 1 <= result <= MAX_RESULT else None


def operand(name: str, values: Mapping[str, int]) -> int:
    """Return the value of a variable, or the integer that a literal spells."""
    return int(name) if name.isdecimal() else values[name]


@dataclasses.dataclass(frozen=True)
class Template:
    """One situation: see the module's text for the slots.

    Attributes:
        key: unique name.
        story: the sentences that state the numbers.
        ask: the question, or empty.
        steps: the plan; the last step's result is the answer.
        numbers: range of each number in the text, both ends included.
        nouns: the nouns each noun slot may take; slots of one template get different nouns.
        unequal: pairs of number names whose values must differ, where the sense of the text asks for it.
        goal: a statement of what is looked for, or empty.
        close: a statement of the outcome, which may use the results, or empty.
    """

    key: str
    story: str
    ask: str
    steps: tuple[Step, ...]
    numbers: Mapping[str, tuple[int, int]]
    nouns: Mapping[str, tuple[str, ...]]
    unequal: tuple[tuple[str, str], ...] = ()
    goal: str = ""
    close: str = ""

    @functools.cached_property
    def people(self) -> tuple[str, ...]:
        """The person slots in use, in alphabetical order."""
        texts = (self.story, self.ask, self.goal, self.close, *(step.unit for step in self.steps))
        return tuple(sorted({slot for text in texts for slot in _PERSON.findall(text)}))

    def draw_numbers(self, rng: random.Random) -> dict[str, int]:
        """Return numbers and results for which every step stays in range.

        Raises:
            RuntimeError: none were found; the template's ranges contradict its plan.
        """
        for _ in range(_ATTEMPTS):
            values = {name: rng.randint(low, high) for name, (low, high) in self.numbers.items()}
            if all(values[a] != values[b] for a, b in self.unequal) and self._solve(values):
                return values
        raise RuntimeError(f"template {self.key}: no numbers fit its plan")

    def _solve(self, values: dict[str, int]) -> bool:
        for step in self.steps:
            result = step.apply(values)
            if result is None:
                return False
            values[step.result] = result
        return True

    def draw(self, rng: random.Random) -> Drawn:
        """Return the template with numbers, people, nouns and wordings chosen."""
        values = self.draw_numbers(rng)
        slots: dict[str, Any] = dict(values)
        slots |= zip(self.people, draw_people(rng, len(self.people)), strict=True)
        taken: list[str] = []
        for name, choices in self.nouns.items():
            taken.append(rng.choice([noun for noun in choices if noun not in taken]))
            slots[name] = Noun(taken[-1])
        return Drawn(self, values, slots)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A template with its slots filled."""

    template: Template
    values: Mapping[str, int]
    slots: Mapping[str, Any]

    @property
    def answer(self) -> int:
        """The last step's result."""
        return self.values[self.template.steps[-1].result]

    def text(self, template: str, rng: random.Random) -> str:
        """Return ``template`` with its choices made and its slots filled."""
        return fill(template, rng, self.slots)

    def equation(self, step: Step) -> str:
        """Return ``12 - 5 = 7`` for one step."""
        left, right = operand(step.left, self.values), operand(step.right, self.values)
        return f"{left} {step.op} {right} = {self.values[step.result]}"

    def line(self, step: Step) -> str:
        """Return ``12 - 5 = 7 apples`` for one step."""
        left, right = operand(step.left, self.values), operand(step.right, self.values)
        return f"{left} {step.op} {right} = {counted(self.values[step.result], step.unit.format_map(self.slots))}"


def fill(template: str, rng: random.Random, slots: Mapping[str, Any]) -> str:
    """Return ``template`` with one wording taken from each ``[a|b]`` and its slots filled."""
    chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return chosen.format_map(slots)


@functools.cache
def load_templates(name: str) -> tuple[Template, ...]:
    """Return the templates of ``texts/<name>.txt`` in file order.

    Raises:
        ValueError: a paragraph is not a template (its first line is named).
    """
    text = importlib.resources.files("mambacus.data").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("//")]
    return tuple(_parse_template(block) for block in "\n".join(lines).split("\n\n") if block.strip())


def _parse_template(block: str) -> Template:
    """Read one paragraph; see the module's text."""
    head, story, *rest, slots = block.strip().splitlines()
    marked: dict[str, list[str]] = {"?": [], "~": [], "=": [], "!": []}
    for line in rest:
        marked.get(line[0], []).append(line[2:])
    read = sum(map(len, marked.values()))
    once = all(len(marked[mark]) <= 1 for mark in "?~!")
    if not head.startswith("# ") or read < len(rest) or not once or not marked["="] or not (marked["?"] or marked["~"]):
        raise ValueError(f"not a template: {head!r}")
    numbers: dict[str, tuple[int, int]] = {}
    nouns: dict[str, tuple[str, ...]] = {}
    unequal: list[tuple[str, str]] = []
    for part in slots.split("; "):
        if match := _RANGE.fullmatch(part):
            numbers[match[1]] = (int(match[2]), int(match[3]))
        elif match := _UNEQUAL.fullmatch(part):
            unequal.append((match[1], match[2]))
        elif match := _NOUNS.fullmatch(part):
            nouns[match[1]] = tuple(noun for name in match[2].split() for noun in NOUNS[name])
        else:
            raise ValueError(f"template {head!r}: not a range, nouns or an inequality: {part!r}")
    steps = tuple(map(Step.parse, marked["="]))
    ask, goal, close = ("".join(marked[mark]) for mark in "?~!")
    return Template(head[2:], story, ask, steps, numbers, nouns, tuple(unequal), goal, close)
