"""People and things that the generated texts speak of, with the grammar they need (plural, article, pronouns)."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping

GIRLS = (
    "Mia", "Anna", "Lena", "Sofia", "Emma", "Nora", "Ella", "Ruby", "Clara", "Ivy",
    "Maya", "Zoe", "Alice", "Rosa", "Leah", "Tina", "Grace", "Hana", "Julia", "Kate",
    "Amina", "Lucy", "Sara", "Nina", "Olga", "Wendy", "Priya", "Fay", "Eva", "Dana",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Sam", "Leo", "Max", "Jack", "Omar", "Paul", "Finn", "Noah",
    "Adam", "Luca", "Peter", "Ravi", "Hugo", "Oscar", "David", "Karl", "Milo", "Eric",
    "Jonas", "Ali", "Henry", "Owen", "Nick", "Simon", "Theo", "Felix", "Ivan", "Dan",
)  # fmt: skip

FRUIT = ("apple", "pear", "plum", "peach", "orange", "lemon", "cherry", "apricot", "mango", "fig", "grape", "melon")
VEGETABLES = ("carrot", "potato", "tomato", "onion", "pepper", "turnip", "cucumber", "pumpkin")
BAKED = ("cookie", "muffin", "roll", "bun", "pie", "cake", "waffle", "pancake", "tart", "sandwich", "biscuit")
SWEETS = ("candy", "lollipop", "chocolate", "toffee", "mint", "nut", "raisin", "cracker")
TOYS = ("toy car", "ball", "doll", "puzzle", "kite", "drum", "robot", "top", "toy boat", "teddy bear")
SCHOOL = ("pencil", "pen", "crayon", "notebook", "eraser", "ruler", "marker", "brush", "folder")
SMALL = ("marble", "stamp", "shell", "coin", "button", "bead", "sticker", "card", "pebble", "badge", "feather", "key")
ANIMALS = ("cow", "sheep", "goat", "hen", "duck", "horse", "pig", "rabbit", "goose", "lamb", "pony", "turkey")
FLOWERS = ("rose", "tulip", "daisy", "lily", "violet", "poppy", "sunflower")
CLOTHES = ("shirt", "hat", "scarf", "coat", "dress", "cap", "belt", "sweater", "towel", "blanket")
CONTAINERS = ("box", "bag", "basket", "jar", "crate", "tray", "drawer", "bowl", "sack", "bucket")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "gray")
HIDES = ("brown", "white", "black", "gray")
MEALS = ("sausage", "dumpling", "fish cake", "egg roll")

NOUNS: Mapping[str, tuple[str, ...]] = {
    "fruit": FRUIT,
    "vegetables": VEGETABLES,
    "baked": BAKED,
    "treats": BAKED + SWEETS,
    "toys": TOYS,
    "school": SCHOOL,
    "small": SMALL,
    "things": FRUIT + BAKED + SWEETS + SCHOOL + SMALL,
    "animals": ANIMALS,
    "flowers": FLOWERS,
    "clothes": CLOTHES,
    "containers": CONTAINERS,
    "colors": COLORS,
    "hides": HIDES,
    "meals": MEALS,
}

_IRREGULAR = {
    "child": "children", "person": "people", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth",
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "loaf": "loaves", "leaf": "leaves",
    "shelf": "shelves", "scarf": "scarves", "calf": "calves", "knife": "knives", "potato": "potatoes",
    "tomato": "tomatoes", "goldfish": "goldfish",
}  # fmt: skip
_SIBILANTS = ("s", "x", "ch", "sh")


@functools.cache
def plural(noun: str) -> str:
    """Return the plural of a singular noun: ``box`` -> ``boxes``, ``cup of flour`` -> ``cups of flour``."""
    head, of, tail = noun.partition(" of ")
    if of:
        return plural(head) + of + tail
    rest, space, word = noun.rpartition(" ")
    if word in _IRREGULAR:
        return rest + space + _IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if word.endswith(_SIBILANTS) else "s")


def counted(number: int, noun: str) -> str:
    """Return number and noun in agreement: ``1 box``, ``3 boxes``."""
    return f"{number} {noun if number == 1 else plural(noun)}"


class Noun(str):
    """A singular noun for templates: ``{i}`` apple, ``{i.s}`` apples, ``{i.a}`` an apple."""

    __slots__ = ()

    @property
    def s(self) -> str:
        """The plural."""
        return plural(self)

    @property
    def a(self) -> str:
        """The noun with its indefinite article."""
        return f"{'an' if self[0] in 'aeio' else 'a'} {self}"


@dataclasses.dataclass(frozen=True)
class Person:
    """A name with its pronouns, for templates: ``{A}``, ``{A.he}``, ``{A.His}``."""

    name: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name

    @property
    def He(self) -> str:  # noqa: N802 -- the capital form that opens a sentence
        """The pronoun that opens a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:  # noqa: N802 -- the capital form that opens a sentence
        """The possessive that opens a sentence."""
        return self.his.capitalize()


def draw_people(rng: random.Random, count: int) -> list[Person]:
    """Return ``count`` people with different names."""
    return [
        Person(name, "she", "her", "her") if name in GIRLS else Person(name, "he", "him", "his")
        for name in rng.sample(GIRLS + BOYS, count)
    ]
