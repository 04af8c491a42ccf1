"""Recipes: the YAML file that names models, fine-tunings, tasks and benches of a study."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

from mambacus.runtime.config import from_mapping
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.yaml_files import list_of, mapping_of, names_in, read_named

PACKAGED = resources.files("mambacus") / "recipes"
ROLES = ("subject", "baseline")


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model of a study.

    Attributes:
        label: its name in records and reports.
        source: what ``--model`` takes: ``tiny``, a folder or a hub id.
        role: ``subject`` (measured, fine-tuned, measured again) or ``baseline`` (measured only).
        group: models of one group share a radar.
        download_gb: size of the hub download in 10^9 bytes, for the plan; 0 when there is none or it is not known.
    """

    label: str
    source: str
    role: str = "subject"
    group: str = ""
    download_gb: float = 0.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of fine-tuning every subject.

    Attributes:
        label: its name; the tuned model is called ``<model>+<label>``.
        settings: fields of `mambacus.finetune.Config`.
        data_offline: training data used instead of ``data`` when the study runs on a local data folder; empty for none.
    """

    label: str
    settings: dict[str, Any]
    data_offline: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A study.

    Attributes:
        name: the file's stem.
        title: heading of the report.
        description: one or two sentences under it.
        models: who is measured.
        finetune: how subjects are tuned; empty for a study that only measures.
        merge: fields of `mambacus.merge.Config`.
        evaluate: fields of `mambacus.evaluate.Config`, or None for no lm_eval tasks.
        solve: fields of `mambacus.solve.Config`, or None for no math benches.
        generation: fields of `mambacus.bench_generation.Config`, measured with every model of ``models``, or None.
        bench: one mapping of `mambacus.bench.Config` fields per benchmark.
        check_attached: solve with the attached adapter too and report whether it equals the merged model item by item.
    """

    name: str
    title: str
    description: str
    models: tuple[ModelEntry, ...]
    finetune: tuple[Variant, ...] = ()
    merge: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluate: dict[str, Any] | None = None
    solve: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    bench: tuple[dict[str, Any], ...] = ()
    check_attached: bool = False


_MODEL_HINTS = {"label": str, "source": str, "role": str, "group": str, "download_gb": float}
_PLAIN_HINTS = {"title": str, "description": str, "check_attached": bool}
_KEYS = tuple(field.name for field in dataclasses.fields(Recipe) if field.name != "name")


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return names_in(PACKAGED)


def read_recipe(name: str) -> Recipe:
    """Read a recipe file, or a packaged recipe by its bare name (``cs5242``).

    Raises:
        UserError: no such file or packaged recipe, not YAML, or an unknown, missing, repeated or wrong key.
    """
    stem, loaded = read_named(name, PACKAGED, "recipe")
    return _recipe(stem, loaded, f"recipe {name}")


def _recipe(stem: str, loaded: dict[str, Any], where: str) -> Recipe:
    for key in loaded:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), _KEYS)}")
    models = tuple(
        _model(row, f"{where}: models[{place}]") for place, row in enumerate(list_of(loaded, "models", where))
    )
    if not models:
        raise UserError(f"{where}: expected at least one entry under models, got none")
    variants = tuple(
        _variant(row, f"{where}: finetune[{place}]") for place, row in enumerate(list_of(loaded, "finetune", where))
    )
    for what, labels in (("models", [m.label for m in models]), ("finetune", [v.label for v in variants])):
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise UserError(f"{where}: {what}: label {', '.join(repeated)} is given more than once")
    plain = {key: loaded[key] for key in _PLAIN_HINTS if key in loaded}
    about: dict[str, Any] = {"title": stem, "description": "", "check_attached": False} | from_mapping(
        plain, _PLAIN_HINTS, where
    )
    return Recipe(
        name=stem,
        title=about["title"],
        description=" ".join(about["description"].split()),
        models=models,
        finetune=variants,
        merge=mapping_of(loaded.get("merge", {}), f"{where}: merge"),
        evaluate=mapping_of(loaded["evaluate"], f"{where}: evaluate") if loaded.get("evaluate") else None,
        solve=mapping_of(loaded["solve"], f"{where}: solve") if loaded.get("solve") else None,
        generation=mapping_of(loaded["generation"], f"{where}: generation") if loaded.get("generation") else None,
        bench=tuple(mapping_of(row, f"{where}: bench") for row in list_of(loaded, "bench", where)),
        check_attached=about["check_attached"],
    )


def _model(row: Any, where: str) -> ModelEntry:
    values = from_mapping(mapping_of(row, where), _MODEL_HINTS, where)
    for key in ("label", "source"):
        if not values.get(key):
            raise UserError(f"{where}: missing key {key!r}")
    entry = ModelEntry(**values)
    if entry.role not in ROLES:
        raise UserError(f"{where}: role: expected {' or '.join(ROLES)}, got {entry.role!r}{suggest(entry.role, ROLES)}")
    return entry


def _variant(row: Any, where: str) -> Variant:
    values = dict(mapping_of(row, where))
    label, offline = str(values.pop("label", "")), str(values.pop("data_offline", ""))
    if not label:
        raise UserError(f"{where}: missing key 'label'")
    if "data" not in values:
        raise UserError(f"{where}: missing key 'data'")
    return Variant(label, values, offline)


def choose_models(recipe: Recipe, wanted: tuple[str, ...], here: Path | None = None) -> tuple[Recipe, list[str]]:
    """Keep the models named by ``wanted``; a name that is no label of the recipe stands in as a subject of its own.

    Args:
        recipe: the recipe.
        wanted: labels of the recipe, or other models (``tiny``, a folder, a hub id ``owner/name``, ``random:SIZE``).
        here: folder that relative model folders are looked up in (default: the working directory).

    Returns:
        The recipe with those models, and one sentence on each stand-in for the plan and the report.

    Raises:
        UserError: a name that is neither a label nor looks like a model.
    """
    if not wanted:
        return recipe, []
    entries = {entry.label: entry for entry in recipe.models}
    chosen, notes = [], []
    for name in wanted:
        if name in entries:
            chosen.append(entries[name])
            continue
        folder = (here or Path.cwd()) / name
        if name != "tiny" and not name.startswith("random:") and "/" not in name and not folder.is_dir():
            raise UserError(f"--models: {name!r} is neither a label of the recipe ({', '.join(entries)}) nor a model"
                            f"{suggest(name, [*entries, 'tiny'])}")  # fmt: skip
        chosen.append(ModelEntry(label=name.rstrip("/").rpartition("/")[2].replace(":", "-"), source=name))
        notes.append(f"{name} is no model of the recipe: it stands in as a subject (--models {','.join(wanted)}).")
    if notes:
        left = [entry.label for entry in recipe.models if entry not in chosen]
        if left:
            notes.append(f"Models of the recipe left out: {', '.join(left)}.")
    return dataclasses.replace(recipe, models=tuple(chosen)), notes
