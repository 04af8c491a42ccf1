"""Records whose figures are not finite: a page is drawn, with dashes for them and curves without them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mambacus.reporting.charts import Series, Value, make_chart
from mambacus.reporting.figures import draw
from mambacus.reporting.page import build, render
from mambacus.reporting.panels import Interval, make_panel
from mambacus.reporting.scales import linear_scale, log_scale
from mambacus.reporting.sources import collect

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = ("nan", "inf", "-inf")  # as records spell them


def _records() -> list[Path]:
    """Return the smallest committed record of every kind, and of every kind of bench."""
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(BENCHMARKS.rglob("*.json"), key=lambda path: path.stat().st_size):
        record = json.loads(path.read_bytes())
        rows = record.get("results", {}).get("rows") if record.get("kind") == "bench" else None
        kinds = ("case", "benchmark", "shape", "result", "ms")
        shape = tuple(key for key in kinds if rows and key in rows[0]) or tuple(record.get("results", ()))
        if record.get("kind") not in (None, "report", "study"):
            found.setdefault((record["kind"], *(shape if rows is not None else ())), path)
    return sorted(found.values())


def _replaced(value: Any, word: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(part, word) for key, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, word) for part in value]
    return word if isinstance(value, float) else value


def _copy(path: Path, folder: Path, word: str) -> Path:
    record = json.loads(path.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    replaced = folder / path.name
    replaced.write_text(json.dumps(record | {"results": _replaced(record["results"], word), "seconds": word}))
    if record["items_file"]:
        shutil.copy(path.parent / record["items_file"], folder)
    return replaced


def _shown(text: str) -> str:
    """Return what a reader sees of a page: no scripts, styles or attributes."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S))


def test_every_kind_of_record_is_tested():
    kinds = {json.loads(path.read_bytes())["kind"] for path in _records()}
    assert {"bench", "controlled", "evaluate", "finetune", "merge", "prompt", "serve-soak", "solve", "sweep"} <= kinds


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("path", _records(), ids=lambda path: path.stem)
def test_a_record_without_finite_figures_makes_a_page(path, word, tmp_path):
    page = build(collect([_copy(path, tmp_path, word)]), root=tmp_path)
    text = render(page)
    named = re.findall(r"(?<![\w-])-?(?:nan|inf)(?!\w)", _shown(text))
    assert not named, f"{path.name}: {named}"
    assert not re.findall(r'="[^"]*\b(?:nan|inf)\b[^"]*"', re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S))
    assert page.undrawn.rows == build(collect([path]), root=tmp_path).undrawn.rows  # a dash is drawn, not left out


@pytest.mark.parametrize("word", WORDS)
def test_a_pair_of_models_without_finite_figures_makes_a_page(word, tmp_path):
    demo = BENCHMARKS / "cpu-demo-2026-11-26"
    for path in demo.rglob("*.json"):
        if json.loads(path.read_bytes()).get("kind") not in (None, "report"):
            _copy(path, tmp_path / path.relative_to(demo).parent, word)
    page = build(collect([tmp_path]), root=tmp_path)
    assert page.pairs and render(page)
    draw(page, {"svg": tmp_path / "svg"})


def test_a_curve_goes_round_what_is_not_finite_and_says_so():
    values = [Value(1.0, 2.0, "one"), Value(2.0, math.nan, "two"), Value(3.0, math.inf, "three"), Value(4.0, 8.0, "4")]
    for scale in (linear_scale, log_scale):
        up = scale((value.y for value in values), str)
        across = linear_scale((value.x for value in values), str)
        (curve,) = make_chart("t", ("x", across), ("y", up), [Series("s", 0, tuple(values))]).curves
        assert [point.tip for point in curve.points] == ["one", "4"]
        assert [cross.tip for cross in curve.crosses] == ["two (not finite)", "three (not finite)"]
        assert all(math.isfinite(point.y) for point in curve.points + curve.crosses)


def test_losses_that_are_not_finite_are_counted_under_the_curve(tmp_path):
    path = next(path for path in BENCHMARKS.rglob("record.json") if "finetune" in path.parts)
    record = json.loads(path.read_bytes())
    history = record["results"]["history"]
    history[1]["loss"], history[2]["loss"] = "nan", "inf"
    (tmp_path / "r.json").write_text(json.dumps(record))
    page = build(collect([tmp_path]), root=tmp_path)
    (figure,) = page.section("training").figures
    assert figure.notes == (f"{record['label']}: 2 of {len(history)} losses are not finite and left out.",)
    assert figure.notes[0] in render(page)


def test_a_bar_that_is_not_finite_is_named_beside_the_panel():
    good = Interval("good", -1.0, 1.0, 0.0, "", "", "open")
    panel = make_panel("t", "unit", [good, dataclasses.replace(good, title="bad", high=math.nan)], 1.0, flip=False)
    assert [bar.row.title for bar in panel.bars] == ["good"]
    assert panel.note == "unit; left out, not finite: bad"
