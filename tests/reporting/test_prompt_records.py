"""The report's section on prompts, from a record with known figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mambacus.reporting.page import build, render
from mambacus.reporting.prompts import prompt_table
from mambacus.reporting.sources import collect
from mambacus.runtime.records import Stopwatch, write_record

RESULTS = {
    "bench": "gsm8k",
    "search": {"tokens": {"forward": 51234, "times_fewer": 4.26}},
    "finals": {"chosen": "4-shot, 'Q: {question} A:'"},
    "test": {
        "n": 400,
        "prompts": {
            "default": {"correct": 20, "accuracy": 0.05, "wilson95": [0.0326, 0.076], "loglikelihood": -61.24},
            "optimised": {"correct": 40, "accuracy": 0.1, "wilson95": [0.0743, 0.1333], "loglikelihood": -60.0},
        },
        "optimised_against": {
            "default": {
                "difference": 0.05,
                "low": 0.021,
                "high": 0.08,
                "gained": 25,
                "lost": 5,
                "p": 0.0003,
                "loglikelihood": {"difference": 1.24, "low": 0.5, "high": 2.0},
            }
        },
    },
}


def test_the_table_shows_accuracy_gain_and_cost(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", dataclasses.replace(Stopwatch().record("prompt", "tiny", {}, RESULTS)))
    sources = collect([tmp_path / "r.json"])
    default, optimised = prompt_table(sources).rows
    assert [cell.text for cell in default[:4]] == ["gsm8k", "default prompt", "400", "5.0 %"]
    assert (default[4].text, default[4].note) == ("+5.0 points", "+2.1 to +8.0")
    assert default[5].note == "+25 / −5" and default[7].text == ""
    assert (default[6].text, default[6].note) == ("-61.2", "optimised +1.24, +0.50 to +2.00")
    assert optimised[1].note == "4-shot, 'Q: {question} A:'" and optimised[4].text == "–"
    assert optimised[6].text == "-60.0"
    assert (optimised[7].text, optimised[7].note) == ("51,234", "4.3 × fewer than without states")
    html = render(build(sources))
    assert '<section id="prompts">' in html and 'href="#prompts"' in html and "best random prompt" not in html
