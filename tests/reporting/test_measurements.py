"""Efficiency over length, the scan, methods compared and the controlled study, drawn from records of known outcome."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path

import pytest
from synthetic_measurements import LAST_OF_PEER, LENGTHS, write_controlled, write_lengths, write_scan, write_sweep
from synthetic_records import record, write_record

from mambacus.reporting.export import markdown
from mambacus.reporting.figures import draw
from mambacus.reporting.page import Page, build, render
from mambacus.reporting.scales import linear_scale, log_scale, steps_scale
from mambacus.reporting.sources import collect


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("measured")
    for name, write in (("a", write_lengths), ("b", write_scan), ("c", write_sweep), ("d", write_controlled)):
        write(folder / f"{name}.json")
    return build(collect([folder]), root=folder)


def test_records_of_measurements_alone_make_a_page(page):
    assert [section.name for section in page.sections] == ["controlled", "methods", "efficiency", "speed"]
    text = render(page)
    for section in page.sections:
        assert f'<section id="{section.name}"' in text and f'href="#{section.name}"' in text
    assert page.radars == () and page.pairs == ()


def test_efficiency_has_a_figure_per_benchmark_with_every_quantity(page):
    figures = page.section("efficiency").figures
    assert [figure.title for figure in figures] == [
        "Prefill: 130m, batch 1, bfloat16",
        "Train: 130m, batch 1, bfloat16",
        "Decode: 130m, batch 1, bfloat16, 64 new tokens",
    ]
    assert all(figure.numbers == (1,) for figure in figures)
    titles = [chart.title for chart in figures[0].charts]
    assert titles == ["Time", "Tokens per second", "Peak memory", "State or key-value cache", "Energy"]
    assert [entry[0] for entry in figures[0].entries] == ["mambacus", "mambacus, graph", "pythia-160m"]


def test_curves_meet_where_the_crossing_is_marked(page):
    time = page.section("efficiency").figures[0].charts[0]
    ours, graph, peer = time.curves
    (mark,) = time.crossings
    assert (mark.text, mark.tip) == ("equal at 4,096", "Time: mambacus and pythia-160m are equal at about 4,096 tokens")
    place = LENGTHS.index(4096)
    assert ours.points[place].x == peer.points[place].x == mark.x
    assert ours.points[place].y == peer.points[place].y
    assert ours.points[-1].y < ours.points[0].y  # more time stands higher
    assert graph.dashed and not ours.dashed and graph.colour == ours.colour
    assert ours.points[0].tip == "mambacus\n1,024 tokens: 10.2 ms"


def test_log_axes_make_doubling_equal_steps(page):
    (points,) = (curve.points for curve in page.section("efficiency").figures[0].charts[0].curves[:1])
    across = [right.x - left.x for left, right in itertools.pairwise(points)]
    down = [left.y - right.y for left, right in itertools.pairwise(points)]
    assert across == pytest.approx([across[0]] * len(across), abs=0.02)
    assert down == pytest.approx([down[0]] * len(down), abs=0.02)


def test_out_of_memory_is_a_mark_and_not_a_gap(page):
    for chart in page.section("efficiency").figures[0].charts:
        peer = chart.curves[-1]
        assert len(peer.points) == LENGTHS.index(LAST_OF_PEER) + 1
        assert [cross.tip for cross in peer.crosses] == [
            f"pythia-160m\n{length:,} tokens: out of memory" for length in LENGTHS if length > LAST_OF_PEER
        ]
        assert all(cross.y < min(point.y for curve in chart.curves for point in curve.points) for cross in peer.crosses)


def test_crossings_are_listed_and_so_is_their_absence(page):
    rows = [[cell.text for cell in row] for row in page.section("efficiency").tables[0].rows]
    assert rows[0] == [
        "Tokens per second",
        "1",
        "bfloat16",
        "eager",
        "mambacus",
        "pythia-160m",
        "4,096",
        "mambacus is better above",
    ]
    assert rows[1][0] == "State or key-value cache" and rows[1][6] == "none"


def test_speed_table_compares_models_of_matched_size_at_one_length(page):
    table = page.section("speed").tables[0]
    rows = [dict(zip(table.headings, (cell.text for cell in row), strict=True)) for row in table.rows]
    last = [row for row in rows if row["Benchmark"] == "prefill" and row["Batch × tokens"] == "1 × 16,384"]
    assert [row["Ratio"] for row in last] == ["4.00 ×", "8.00 ×", "1.00 ×"]
    assert last[2]["State or cache"] == "576 MiB" and last[0]["FLOPs"] == "4.26 T"
    assert last[0]["Of the limit"] == "25.0 %" and last[0]["Energy"] == "49.2 J"
    assert [row["Median"] for row in rows if row["Batch × tokens"] == "1 × 65,536"][2] == "out of memory"


def test_scan_stands_beside_its_limit_and_the_peer(page):
    table = page.section("speed").tables[1]
    assert table.headings[:4] == ["Shape", "dtype", "Forward", "Both directions"]
    first = [(cell.text, cell.note) for cell in table.rows[0]]
    assert first[0] == ("1 × 1,536 × 2,048", "[2]")
    assert first[2] == ("0.04 ms", "3.33 × of the limit")
    assert first[5] == ("0.071 ms", "1.77 × ours")
    assert first[-1] == (
        "1.6e-03",
        "of a part",
    )  # as records had it before all numbers of the timed passes were checked
    (figure,) = page.section("speed").figures
    assert [len(curve.points) for curve in figure.charts[0].curves] == [4, 4, 4, 1, 1]


def test_methods_are_means_over_seeds_with_paired_intervals(page):
    section = page.section("methods")
    rows = {row[0].text: dict(zip(section.tables[0].headings, row, strict=True))
            for row in section.tables[0].rows}  # fmt: skip
    assert rows["lora"]["Method"].note == "3 seeds [3]"
    accuracy = rows["lora"]["Word problems, accuracy"]
    assert (accuracy.text, accuracy.note, accuracy.style) == (
        "80.0 %",
        "+60.0, 95 % +55.0 to +65.0; seeds 79.0 % to 81.0 %; n = 200",
        "better",
    )
    assert rows["bitfit"]["Word problems, accuracy"].style == "worse"
    assert rows["ia3"]["Word problems, accuracy"].style == ""
    assert rows["lora"]["English novels, perplexity"].style == "worse"  # lower is better there
    assert rows["ia3"]["English novels, perplexity"].style == "better"
    assert (rows["lora"]["Time"].text, rows["lora"]["Peak memory"].text) == ("1 min 18 s", "1 GiB")
    (base,) = (row for row in section.tables[0].rows if row[0].note == "before training [3]")
    assert [cell.text for cell in base[3:5]] == ["20.0 %", "54.00"] and section.notes == ()


def test_methods_take_time_and_memory_from_a_sweep_of_its_own_where_runs_shared_the_machine(tmp_path):
    shared, alone = (write_sweep(tmp_path / name) for name in ("a.json", "b.json"))

    def edit(path, change):
        raw = json.loads(path.read_text())
        change(raw["results"])
        path.write_text(json.dumps(raw))

    def share(results):
        results["one_at_a_time"] = False
        for run in results["runs"]:
            run["peak_memory_of"] = "process"

    def bare(results):
        results["one_at_a_time"] = True
        results["runs"] = [
            run | {"check": {}, "seconds": 5.0, "peak_memory_bytes": 2**20, "peak_memory_of": "steps"}
            for run in results["runs"]
            if run["seed"] == 0 and run["method"] != "ia3"
        ]

    edit(shared, share)
    section = build(collect([shared])).section("methods")
    assert not {"Time", "Tokens/s", "Peak memory"} & set(section.tables[0].headings)
    assert [note.partition(":")[0] for note in section.notes] == ["Time is left out [1]", "Memory is left out [1]"]

    edit(alone, bare)
    section = build(collect([shared, alone])).section("methods")
    rows = {row[0].text: dict(zip(section.tables[0].headings, row, strict=True)) for row in section.tables[0].rows}
    assert list(rows) == ["tiny: method x seed", "lora", "bitfit", "ia3"]
    assert [(rows["lora"][name].text, rows["lora"][name].note) for name in ("Time", "Peak memory")] == [
        ("5.0 s", "[2]"), ("1 MiB", "[2]"),
    ]  # fmt: skip
    assert rows["lora"]["Last loss"].text == "0.050" and rows["ia3"]["Time"].text == "–"
    assert [bar.row.title for bar in section.panels[0].bars] == ["lora", "bitfit", "ia3"]

    section = build(collect([alone])).section("methods")  # alone it is a comparison like any other
    assert [row[0].text for row in section.tables[0].rows] == ["lora", "bitfit"]


def test_methods_leave_the_seconds_of_one_sweep_out_beside_one_that_tells_none(tmp_path):
    shared, other = (write_sweep(tmp_path / name) for name in ("a.json", "b.json"))
    raw = json.loads(shared.read_text())
    raw["results"]["one_at_a_time"] = False
    shared.write_text(json.dumps(raw))
    raw = json.loads(other.read_text())
    raw["config"]["data"] = "gsm8k"  # not the same training, so its seconds are no costs of the other
    other.write_text(json.dumps(raw))

    section = build(collect([other])).section("methods")
    assert "Time" in section.tables[0].headings and section.notes == ()
    section = build(collect([shared, other])).section("methods")
    assert not {"Time", "Tokens/s"} & set(section.tables[0].headings)
    assert [note.partition(":")[0] for note in section.notes] == ["Time is left out [1]", "Time is left out [2]"]


@pytest.mark.parametrize("name", ["methods", "methods-gsm8k"])
def test_the_documentation_of_methods_prints_the_tables_of_the_records(name):
    root = Path(__file__).parents[2]
    text = (root / "docs" / "methods.md").read_text()
    parts = ("20", "[0-9]-20", "solo-20")  # the first record, those that add methods to it, and one of costs
    paths = [path for part in parts for path in sorted((root / "benchmarks").glob(f"gpu-{name}-{part}*.json"))]
    section = build(collect(paths)).section("methods")
    assert f"\n{markdown(section.tables[0])}\n" in text
    assert all(f"benchmarks/{path.name}" in text for path in paths) and f"(images/{name}.svg)" in text


def test_methods_put_better_to_the_right_on_every_panel(page):
    panels = page.section("methods").panels
    assert [panel.title for panel in panels] == ["Word problems, accuracy", "English novels, perplexity"]
    for panel in panels:
        for bar in panel.bars:
            if bar.row.verdict != "open":
                assert (bar.middle > panel.zero) == (bar.row.verdict == "better")
            assert len(bar.dots) == 3 and bar.low <= min(bar.dots) <= max(bar.dots) <= bar.high


def test_controlled_study_draws_intervals_beside_what_was_predicted(page):
    section = page.section("controlled")
    assert [figure.title for figure in section.figures] == ["Copying", "Addition reversed"]
    copying = section.figures[0]
    assert copying.notes == (
        "Predicted: Mamba loses: its state is fixed, the Transformer’s cache grows with the pairs.",
        "Found: as predicted",
    )
    mamba, transformer = copying.charts[0].curves
    assert (mamba.label, transformer.label) == ("Mamba, state 16", "Transformer")
    assert mamba.points[-1].y > transformer.points[-1].y  # less accuracy stands lower
    top, bottom = mamba.points[-1].span
    assert top < mamba.points[-1].y < bottom
    assert mamba.points[-1].tip == "Mamba, state 16\npairs 512: 10.0 %, 95 %: 4.0 % to 16.0 %, 3 seeds"
    rows = [[cell.text for cell in row] for row in section.tables[0].rows]
    assert rows[3] == ["Copying", "512", "10.0 %", "95.0 %"]
    assert section.tables[0].rows[3][2].note == "4.0 % to 16.0 %, 3 seeds"
    assert copying.charts[0].crossings == ()
    (trained,) = section.figures[1].charts[0].crossings
    assert trained.text == "trained up to 5" and trained.x == section.figures[1].charts[0].curves[0].points[1].x
    assert section.notes == (
        "Who copies? [4]",
        "Only 12 of 14 runs are finished [4].",
        "copying, mamba: the rate 0.003 is the largest tried [4].",
    )


def test_a_crossing_is_drawn_in_the_figure_of_its_number_of_new_tokens(tmp_path: Path):
    raw = json.loads(write_lengths(tmp_path / "a.json").read_text())
    rows = [row for row in raw["results"]["rows"] if row["benchmark"] == "decode"]
    crossings = [one for one in raw["results"]["crossovers"] if one["benchmark"] == "decode"]
    raw["results"]["rows"] = [row | {"new_tokens": steps} for steps in (16, 64) for row in rows]
    raw["results"]["crossovers"] = [one | {"new_tokens": 64} for one in crossings]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    section = build(collect([tmp_path])).section("efficiency")
    assert [len(figure.charts[0].crossings) for figure in section.figures] == [0, 1]
    assert "decode, 64 new tokens" in section.tables[0].rows[0][0].note


def test_a_script_is_listed_with_its_command(tmp_path: Path):
    made = dataclasses.replace(record("bench", "gpu", {}, {"rows": []}), command=["python", "benchmarks/gpu_ops.py"])
    write_record(tmp_path / "a.json", made)
    assert build(collect([tmp_path])).records.rows[0][3].text == "python benchmarks/gpu_ops.py"


def test_rows_of_the_training_script_are_drawn_too(tmp_path: Path):
    row = {"case": "train:130m:8x2048", "ms": 91.96, "tokens_per_second": 178156, "peak_gib": 9.77, "kernels": []}
    write_record(tmp_path / "a.json", record("bench", "gpu", {}, {"rows": [row]}))
    write_record(tmp_path / "b.json", record("bench", "launches", {}, {"launches": []}))
    page = build(collect([tmp_path]))
    (cells,) = page.section("speed").tables[0].rows
    assert [cell.text for cell in cells][:5] == ["train", "mambacus", "mixed", "8 × 2,048", "92 ms"]
    assert len(page.records.rows) == 2 and len(page.undrawn.rows) == 1  # what has no drawing is listed


@pytest.mark.slow
def test_every_figure_is_drawn_as_files_without_a_warning(page, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = draw(page, {"png": tmp_path / "png", "svg": tmp_path / "svg"})
    figures = sum(len(section.figures) + bool(section.panels) for section in page.sections)
    assert len(files) == len(set(files)) == 2 * figures and all(file.stat().st_size > 5000 for file in files)


def test_scales_hold_their_values_and_name_round_ones():
    up = log_scale([3.0, 40_000.0], str)
    assert [value for value, _ in up.ticks] == [10.0, 100.0, 1000.0, 10_000.0]
    assert 0 < up.place(3.0) < up.place(346.0) < up.place(40_000.0) < 100
    assert [value for value, _ in log_scale([3 * 2**20, 2**29], str, base=2).ticks][:2] == [2**22, 2**24]
    assert len(log_scale([100.0, 104.0], str).ticks) > 1
    across = steps_scale([1024, 2048, 4096, 8192], str)
    assert across.log and [value for value, _ in across.ticks] == [1024, 2048, 4096, 8192]
    assert not steps_scale([3, 5, 7], str).log and not steps_scale([0, 8], str).log
    assert steps_scale([5], str).place(5) == 50
    level = linear_scale([0.0, 0.37], str, zero=True)
    assert (level.low, level.high) == (0.0, pytest.approx(0.4))
