"""Cross-over lengths from known curves."""

from __future__ import annotations

import pytest

from mambacus.measuring.crossovers import crossovers


def rows(ours: dict[int, float], peer: dict[int, float | str], metric: str = "tokens_per_second") -> list[dict]:
    made = []
    for name, curve in (("mambacus", ours), ("pythia-160m", peer)):
        for seqlen, value in curve.items():
            row = {"benchmark": "decode", "batch": 1, "dtype": "float32", "graph": False, "method": "full"}
            figure = {"error": value} if isinstance(value, str) else {metric: value}
            made.append(row | {"implementation": name, "seqlen": seqlen} | figure)
    return made


def test_the_crossing_of_two_power_laws_is_exact():
    lengths = (100, 1000, 10000)  # constant 50 against 100000 / L: they meet at 2000
    (entry,) = crossovers(rows(dict.fromkeys(lengths, 50.0), {length: 1e5 / length for length in lengths}))
    assert entry["seqlen"] == pytest.approx(2000, abs=0.1)
    assert entry["note"] == "mambacus is better above"
    assert (entry["metric"], entry["ours"], entry["peer"]) == ("tokens_per_second", "mambacus", "pythia-160m")


def test_of_memory_less_is_better():
    ours, peer = {100: 8.0, 1000: 8.0}, {100: 4.0, 1000: 16.0}
    (entry,) = crossovers(rows(ours, peer, "peak_memory_bytes"))
    assert entry["note"] == "mambacus is better above"
    assert entry["seqlen"] == pytest.approx(10**2.5, abs=0.1)


def test_curves_of_other_numbers_of_new_tokens_are_apart():
    few = [row | {"new_tokens": 16} for row in rows({100: 2.0, 10000: 2.0}, {100: 4.0, 10000: 1.0})]
    many = [row | {"new_tokens": 64} for row in rows({100: 2.0, 10000: 2.0}, {100: 1.0, 10000: 1.0})]
    found = crossovers(few + many)
    assert [(entry["new_tokens"], entry["seqlen"]) for entry in found] == [(16, 1000.0), (64, None)]


def test_no_crossing_says_who_is_better_throughout():
    (entry,) = crossovers(rows({100: 3.0, 1000: 3.0}, {100: 5.0, 1000: 4.0}))
    assert entry["seqlen"] is None and entry["note"] == "pythia-160m is better at all of 100 to 1000"


def test_every_crossing_is_listed():
    found = crossovers(rows({1: 2.0, 10: 1.0, 100: 2.0}, {1: 1.0, 10: 2.0, 100: 1.0}))
    assert [entry["note"] for entry in found] == ["pythia-160m is better above", "mambacus is better above"]


def test_a_failure_is_no_point_but_is_named():
    found = crossovers(rows({100: 3.0, 1000: 3.0}, {100: 2.0, 1000: "out of memory"}))
    assert [entry["note"] for entry in found] == [
        "mambacus is better at all of 100 to 100; pythia-160m at 1000: out of memory"
    ]
    assert crossovers(rows({100: 3.0}, {100: "out of memory"})) == []
