"""Who is who: which label is the tuned twin of which base, from flags, a study's record or the records' own paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from mambacus.reporting.sources import Source, of_kind
from mambacus.runtime.errors import UserError, suggest

ROLES = ("subject", "tuned", "baseline", "check")


@dataclasses.dataclass(frozen=True)
class Model:
    """One model under test.

    Attributes:
        label: its name in the records.
        role: ``subject`` (to be tuned), ``tuned``, ``baseline`` (only measured) or ``check`` (a second run of another
            model that must agree with it; left out of the tables).
        base: for ``tuned`` the label before tuning, for ``check`` the label it must agree with, else None.
        group: models of one group share a radar; empty for none.
    """

    label: str
    role: str
    base: str | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Lineup:
    """The models of a page and how their pairs were found.

    Attributes:
        models: in the order they are shown.
        origin: one sentence on how the pairs were found, shown on the page.
    """

    models: tuple[Model, ...]
    origin: str

    @property
    def shown(self) -> list[Model]:
        """The models of the tables: all but checks."""
        return [model for model in self.models if model.role != "check"]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(base, tuned) labels."""
        return [(model.base, model.label) for model in self.models if model.role == "tuned" and model.base]

    @property
    def checks(self) -> list[tuple[str, str]]:
        """(model, second run of it) labels."""
        return [(model.base, model.label) for model in self.models if model.role == "check" and model.base]


def line_up(sources: Sequence[Source], pairs: Iterable[str] = ()) -> Lineup:
    """Find the models and their pairs.

    Args:
        sources: the records of the page.
        pairs: ``base=tuned`` labels given by the user; they replace what the records say.

    Raises:
        UserError: a pair is malformed or names a model without records.
    """
    labels = list(dict.fromkeys(s.label for s in sources if s.record.kind in ("evaluate", "solve") and s.label))
    given = [_split(pair, labels) for pair in pairs]
    if given:
        return _from_pairs(labels, given, "The pairs were named on the command line.")
    studies = of_kind(sources, "study")
    if studies:
        models = [
            Model(row["label"], row["role"], row.get("base"), row.get("group") or "")
            for study in studies
            for row in study.record.results["models"]
            if row["label"] in labels
        ]
        known = {model.label for model in models}
        models += [Model(label, "baseline") for label in labels if label not in known]
        return Lineup(tuple(models), "The pairs are those of the study's recipe.")
    traced = _trace(sources)
    if traced:
        return _from_pairs(labels, traced, "The pairs were traced from the models' paths in the records.")
    if len(labels) == 2:
        origin = "No record says which model was tuned from which: the first one given is taken as the reference."
        return _from_pairs(labels, [(labels[0], labels[1])], origin)
    return _from_pairs(labels, [], "No record says which model was tuned from which: no pairs are compared.")


def _split(pair: str, labels: list[str]) -> tuple[str, str]:
    base, _, tuned = pair.partition("=")
    if not base or not tuned:
        raise UserError(f"--pairs: expected base=tuned, got {pair!r}")
    for label in (base, tuned):
        if label not in labels:
            raise UserError(
                f"--pairs: no evaluate or solve record of {label!r}; there are {', '.join(labels) or 'none'}"
                f"{suggest(label, labels)}"
            )
    return base, tuned


def _from_pairs(labels: list[str], pairs: list[tuple[str, str]], origin: str) -> Lineup:
    bases = {tuned: base for base, tuned in pairs}
    models = [
        Model(label, "tuned", bases[label])
        if label in bases
        else Model(label, "subject" if label in bases.values() else "baseline")
        for label in labels
    ]
    return Lineup(tuple(models), origin)


def _trace(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Return pairs found by following model <- merge <- adapter <- finetune <- base through the records' paths."""
    tuned_from: dict[str, str] = {}  # place of weights or adapter -> the base model it was tuned from
    for source in of_kind(sources, "finetune"):
        out = Path(str(source.record.config["out"]))
        for place in (out, out / "adapter", out / "model"):
            tuned_from[_place(place)] = _place(source.record.config["model"])
    for source in of_kind(sources, "merge"):
        adapter = _place(source.record.config["adapter"])
        if adapter in tuned_from:
            tuned_from[_place(source.record.config["out"])] = tuned_from[adapter]
    plain: dict[str, str] = {}  # model place -> label, for runs without an adapter
    origin: dict[str, str] = {}  # label -> the base model's place
    for source in sources:
        if source.record.kind not in ("evaluate", "solve"):
            continue
        model = _place(source.record.config["model"])
        if source.record.config.get("adapter"):
            origin[source.label] = model
        elif model in tuned_from:
            origin[source.label] = tuned_from[model]
        else:
            plain.setdefault(model, source.label)
    return [(plain[base], label) for label, base in origin.items() if plain.get(base, label) != label]


def _place(name: object) -> str:
    """Return a comparable form of a model name or path: absolute when it looks like a path on this machine."""
    path = Path(str(name))
    return str(path.absolute()) if path.is_absolute() or path.exists() or "/" in str(name) else str(name)
