"""Figures that others published for the same model and metric: shown beside measured ones, never compared in a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib import resources
from typing import Any

import yaml

from mambacus.reporting.metrics import metric_kind
from mambacus.reporting.scores import Key, Scores
from mambacus.reporting.sources import Source


@dataclasses.dataclass(frozen=True)
class Published:
    """Published figures of the models on a page.

    Attributes:
        values: (label, task, metric) -> value in the metric's own unit, shares in [0, 1].
        origins: (label, task, metric) -> the publication, in a few words.
        sources: the publications of all values, in full.
    """

    values: dict[tuple[str, str, str], float]
    origins: dict[tuple[str, str, str], str]
    sources: tuple[str, ...]

    @property
    def source(self) -> str:
        """All publications, in full."""
        return "; ".join(self.sources)

    @property
    def short(self) -> str:
        """All publications, in a few words."""
        return ", ".join(dict.fromkeys(self.origins.values()))

    def get(self, label: str, key: Key) -> float | None:
        """Return the published figure of one model on one metric, or None."""
        return self.values.get((label, *key))


NOTHING = Published({}, {}, ())


def find_published(sources: Iterable[Source], scores: Scores) -> Published:
    """Return the figures of `published.yaml` for the measured metrics of the models whose label or hub id it names.

    A model with an adapter is another model: it has no published figures, whatever its base is called.
    """
    text = resources.files("mambacus.reporting").joinpath("published.yaml").read_text(encoding="utf-8")
    values, origins, measured = {}, {}, set(scores.keys)
    publications = yaml.safe_load(text)["publications"]
    for source in sources:
        if source.record.kind not in ("evaluate", "solve") or source.label not in scores.labels:
            continue
        for table in publications:
            rows = {name.lower(): model["row"] for model in table["models"] for name in model["names"]}
            row = _row(source.record.config, source.label, rows)
            for (task, metric), printed in zip(table["columns"], row, strict=False):
                if (task, metric) in measured:
                    share = metric_kind(metric) == "share"
                    values[source.label, task, metric] = printed / 100 if share else printed
                    origins[source.label, task, metric] = table["short"]
    used = set(origins.values())
    return Published(values, origins, tuple(table["source"] for table in publications if table["short"] in used))


def _row(config: dict[str, Any], label: str, rows: dict[str, list[float]]) -> list[float]:
    if config.get("adapter"):
        return []
    return rows.get(label.lower()) or rows.get(str(config.get("model", "")).lower(), [])
