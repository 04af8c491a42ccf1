"""Pre-training stories: sums told as plain statements, with no question and no answer mark.

    Mia has 7 apples. She buys 5 more. 7 + 5 = 12, so now Mia has 12 apples.

Three kinds: a *ledger* follows one count through events, a *comparison* sets two or three people side by side, and a
*scene* is a template of one situation. A story reckons while it is told, at its end, or not at all.
Scenes are the templates of ``texts/narratives.txt`` and those of the training and test problems of `wordproblems` that
have the two statements: the situation is told and reckoned, and never asked about. The reworded and novel problems are
not told, and nothing holds the format of questions and answers.
"""

from __future__ import annotations

import functools
import importlib.resources
import random
from collections.abc import Mapping
from typing import Any

from mambacus.data.lexicon import CONTAINERS, NOUNS, Noun, counted, draw_people
from mambacus.data.templates import MAX_RESULT, Template, fill, load_templates

_LEDGER_ITEMS = NOUNS["things"] + NOUNS["toys"] + NOUNS["flowers"] + NOUNS["vegetables"] + NOUNS["clothes"]
_COMPARED = (*_LEDGER_ITEMS, "point", "dollar", "coin", "book", "picture", "song", "goal", "page")
_GIVEN_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LEDGER_RATE = 0.25
_COMPARISON_RATE = 0.15
_MAX_EVENTS = 4
_MAX_COUNT = 12
_ASIDE_RATE = 0.15
_GOAL_RATE = 0.85


@functools.cache
def phrases() -> Mapping[str, tuple[str, ...]]:
    """Return the sections of ``texts/phrases.txt``: name -> wordings."""
    text = importlib.resources.files("mambacus.data").joinpath("texts", "phrases.txt").read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            current = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("//"):
            current.append(line)
    return {name: tuple(lines) for name, lines in sections.items()}


def narrative(rng: random.Random) -> str:
    """Return one story; the same state of ``rng`` gives the same story."""
    kind = rng.random()
    if kind < _LEDGER_RATE:
        return _ledger(rng)
    if kind < _LEDGER_RATE + _COMPARISON_RATE:
        return _comparison(rng)
    return _scene(rng)


class _Story:
    """Sentences of one story, and the way it reckons: ``running``, ``final`` or ``bare``."""

    def __init__(self, rng: random.Random, slots: dict[str, Any], styles: tuple[str, ...]) -> None:
        self.rng = rng
        self.slots = slots
        self.style = rng.choices(styles, weights=[{"running": 40, "final": 55, "bare": 5}[name] for name in styles])[0]
        self.told: list[str] = []
        self.last = ""  # the kind of the last event
        self.equations: list[str] = []

    def say(self, section: str) -> None:
        """Tell one wording of a section."""
        self.told.append(fill(self.rng.choice(phrases()[section]), self.rng, self.slots))

    def reckon(self, equation: str, unit: str, section: str = "") -> None:
        """Show an equation now (running, worded as ``section``), keep it for the end (final) or leave it out (bare)."""
        if self.style == "running" and section:
            self.say(section)
        elif self.style != "bare":
            self.equations.append(equation + (f" {unit}" if self.rng.random() < 0.5 else ""))

    def finish(self, goal: str, close: str) -> str:
        """Return the whole text: goal and equations (where they were kept), then the outcome; both are filled texts."""
        if self.equations and self.rng.random() < _GOAL_RATE:
            self.told.append(goal)
        if not self.equations:
            return " ".join([*self.told, close])
        layout = self.rng.random()
        if layout < 0.4:
            return " ".join([*self.told, *(f"{equation}." for equation in self.equations), close])
        if layout < 0.7:
            return "\n".join([" ".join(self.told), *self.equations, close])
        openers = ["First", *["Then"] * (len(self.equations) - 1)] if len(self.equations) > 1 else ["Now"]
        sums = [f"{opener} {equation}." for opener, equation in zip(openers, self.equations, strict=True)]
        return " ".join([*self.told, *sums, close])

    def pick(self, section: str) -> str:
        """Return one filled wording of a section."""
        return fill(self.rng.choice(phrases()[section]), self.rng, self.slots)


def _slots(rng: random.Random, items: tuple[str, ...]) -> dict[str, Any]:
    slots: dict[str, Any] = dict(zip("ABC", draw_people(rng, 3), strict=True))
    item = Noun(rng.choice(items))
    return slots | {
        "i": item,
        "u": item,
        "c": Noun(rng.choice(CONTAINERS)),
        "d": rng.choice(_GIVEN_DAYS),
        "q": rng.choice(phrases()["qualities"]),
        "m": rng.randint(4, 19),
    }


# Ledgers


def _ledger(rng: random.Random) -> str:
    story = _Story(rng, _slots(rng, _LEDGER_ITEMS), ("running", "final", "bare"))
    value = _open_ledger(story)
    grouped = "g" in story.slots
    for _ in range(rng.randint(0 if grouped else 1, _MAX_EVENTS - 1)):
        if rng.random() < _ASIDE_RATE / 2:
            story.say("aside")
        value = _event(story, value)
    if rng.random() < 0.35 and (kind := _last_event(story, value)):
        return story.finish(story.pick(f"{kind} goal"), story.pick(f"{kind} close"))
    goal = f"{story.last} goal" if f"{story.last} goal" in phrases() else "goal"
    return story.finish(story.pick(goal), story.pick("close"))


def _open_ledger(story: _Story) -> int:
    rng, slots = story.rng, story.slots
    if rng.random() < _ASIDE_RATE:
        story.say("aside")
    if rng.random() < 0.3:
        g = rng.randint(2, _MAX_COUNT)
        k = rng.randint(2, min(25, MAX_RESULT // g))
        slots |= {"g": g, "k": k, "r": g * k}
        story.say("group start")
        story.reckon(f"{g} * {k} = {g * k}", slots["i"].s, "group sum")
        return g * k
    slots["x"] = slots["r"] = rng.randint(2, 120)
    story.say("start")
    return int(slots["x"])


def _event(story: _Story, value: int) -> int:
    """Tell one event that changes the count ``value``; return the new count."""
    rng = story.rng
    kinds = ["gain"] * 9 + ["loss"] * 9
    if value <= MAX_RESULT // 2:
        kinds.append("double")
    if value % 2 == 0 and value > 2:
        kinds += ["halve", "halve"]
    kind = rng.choice(kinds)
    if value <= 3:
        kind = "gain"
    elif kind == "gain" and value > MAX_RESULT - 2:
        kind = "loss"
    n = {
        "gain": lambda: rng.randint(2, min(90, MAX_RESULT - value)),
        "loss": lambda: rng.randint(2, value - 1),
        "double": lambda: 2,
        "halve": lambda: 2,
    }[kind]()
    result, equation = {
        "gain": lambda: (value + n, f"{value} + {n}"),
        "loss": lambda: (value - n, f"{value} - {n}"),
        "double": lambda: (2 * value, f"2 * {value}"),
        "halve": lambda: (value // 2, f"{value} / 2"),
    }[kind]()
    story.last = kind
    story.slots |= {"n": n, "v": value, "r": result}
    story.say(kind)
    story.reckon(f"{equation} = {result}", _things(story, result), f"{kind} sum")
    return result


def _last_event(story: _Story, value: int) -> str:
    """Share, pack or sell the count ``value``; return which, or an empty string where no number fits."""
    rng = story.rng
    divisors = [n for n in range(2, _MAX_COUNT + 1) if value % n == 0 and value > n]
    kinds = [
        kind for kind, fits in (("share", divisors), ("pack", divisors), ("sell", value <= MAX_RESULT // 2)) if fits
    ]
    if not kinds:
        return ""
    kind = rng.choice(kinds)
    if kind == "sell":
        n = rng.randint(2, min(_MAX_COUNT, MAX_RESULT // value))
        result, equation = value * n, f"{value} * {n}"
    else:
        n = rng.choice(divisors)
        result, equation = value // n, f"{value} / {n}"
    story.slots |= {"n": n, "v": value, "r": result}
    story.say(kind)
    units = {"sell": "dollars", "pack": "groups", "share": _things(story, result)}
    story.reckon(f"{equation} = {result}", units[kind], f"{kind} sum")
    return kind


def _things(story: _Story, count: int) -> str:
    """Return the story's noun in agreement with ``count``."""
    return counted(count, story.slots["i"]).partition(" ")[2]


# Comparisons


def _comparison(rng: random.Random) -> str:
    story = _Story(rng, _slots(rng, _COMPARED), ("final", "bare"))
    if rng.random() < 0.3:
        return _measured(story)
    slots = story.slots
    x = slots["x"] = rng.randint(2, 90)
    story.told.append(fill("{A} [has|owns] {x} {u.s}.", rng, slots))
    second = _relation(story, x)
    goal = rng.random()
    if goal < 0.25:
        return _conclude(story, "last", second)
    if goal < 0.6 or second >= x:
        total = _add(story, x, second)
        return _conclude(story, "both", total)
    story.reckon(f"{x} - {second} = {x - second}", _things(story, x - second))
    return _conclude(story, "gap", x - second)


def _relation(story: _Story, x: int) -> int:
    """State how many B has by comparison with A's ``x``; return B's number."""
    rng = story.rng
    kinds = ["more", "more", "times"] + ["fewer"] * 2 * (x > 4) + ["half as many"] * (x % 2 == 0 and x > 2) + ["twice"]
    kind = rng.choice(kinds)
    y = rng.randint(3, 6) if kind == "times" else rng.randint(2, min(40, x - 1 if kind == "fewer" else 40))
    result, equation = {
        "more": (x + y, f"{x} + {y}"),
        "fewer": (x - y, f"{x} - {y}"),
        "times": (y * x, f"{y} * {x}"),
        "twice": (2 * x, f"2 * {x}"),
        "half as many": (x // 2, f"{x} / 2"),
    }[kind]
    if result > MAX_RESULT:
        kind, result, equation = "twice", 2 * x, f"2 * {x}"
    story.slots |= {"y": y, "r": result}
    story.say(kind)
    story.reckon(f"{equation} = {result}", _things(story, result))
    return result


def _add(story: _Story, first: int, second: int) -> int:
    story.reckon(f"{first} + {second} = {first + second}", _things(story, first + second))
    return first + second


def _conclude(story: _Story, kind: str, result: int) -> str:
    story.slots["r"] = result
    return story.finish(story.pick(f"{kind} goal"), story.pick(f"{kind} close"))


def _measured(story: _Story) -> str:
    """Compare two or three things by age, height, weight or length."""
    rng, slots = story.rng, story.slots
    *names, unit, adjective, more, less = rng.choice(phrases()["measures"]).split("|")
    first, second, third = (name.format_map(slots) for name in names)
    units = Noun(unit).s
    x, y = rng.randint(12, 80), rng.randint(2, 11)
    story.slots["i"] = Noun(unit)
    story.told.append(f"{first} is {x} {units} {adjective}.")
    values = [x]
    for name, other in ((second, first), (third, second))[: rng.randint(1, 2)]:
        up = rng.random() < 0.5 or values[-1] - y < 2
        value = values[-1] + (y if up else -y)
        story.told.append(f"{name} is {y} {units} {more if up else less} than {other}.")
        story.reckon(f"{values[-1]} {'+' if up else '-'} {y} = {value}", units)
        values.append(value)
        y = rng.randint(2, 11)
    if len(values) == 3:
        result = values[0] + values[2]
        story.reckon(f"{values[0]} + {values[2]} = {result}", units)
        return story.finish(f"{first} and {third} are taken together.", f"Together they make {result} {units}.")
    close = f"So {second} is {values[1]} {units} {adjective}."
    return story.finish(f"It remains to find how {adjective} {second} is.", close)


# Scenes


@functools.cache
def scenes() -> tuple[Template, ...]:
    """Return the templates that are told as scenes: those with a goal and an outcome."""
    return tuple(t for name in ("narratives", "train", "test") for t in load_templates(name) if t.goal and t.close)


def _scene(rng: random.Random) -> str:
    drawn = rng.choice(scenes()).draw(rng)
    template = drawn.template
    story = _Story(rng, dict(drawn.slots), ("final", "bare"))
    if rng.random() < _ASIDE_RATE:
        extra = {"m": rng.randint(4, 19), "q": rng.choice(phrases()["qualities"])} | _people(rng, story.slots)
        story.told.append(fill(rng.choice(phrases()["aside"]), rng, story.slots | extra))
    story.told.append(drawn.text(template.story, rng))
    for step in template.steps:
        unit = counted(drawn.values[step.result], step.unit.format_map(drawn.slots)).partition(" ")[2]
        story.reckon(drawn.equation(step), unit)
    return story.finish(drawn.text(template.goal, rng), drawn.text(template.close, rng))


def _people(rng: random.Random, slots: Mapping[str, Any]) -> dict[str, Any]:
    """Return people for the slots A and B that a scene itself does not name."""
    taken = {str(person) for name, person in slots.items() if name in "ABC"}
    spare = [person for person in draw_people(rng, 5) if person.name not in taken]
    return {name: slots.get(name, person) for name, person in zip("AB", spare, strict=False)}
