from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest
from synthetic_records import coin, flip, record, texts, write_evaluate, write_record, write_solve

from mambacus.reporting.page import Page, build, render
from mambacus.reporting.sources import collect
from mambacus.runtime.records import read_jsonl, write_jsonl_atomic

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(html.parser.HTMLParser):
    """Collects attributes that make a browser fetch something, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name in ("src", "srcset", "data", "action", "poster", "xlink:href"):
            if name in values:
                self.fetched.append(f"{tag} {name}={values[name]}")
        if "href" in values and not (tag == "a" and values["href"].startswith("#")):
            self.fetched.append(f"{tag} href={values['href']}")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


@pytest.fixture(scope="module")
def text(page: Page) -> str:
    return render(page)


def test_the_page_is_well_formed_and_fetches_nothing(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'" in text  # and the browser is told to refuse if something slipped in


def test_the_page_has_every_section(text):
    for section in ("shape", "change", "solving", "problems", "scores", "training", "speed", "records"):
        assert f'<section id="{section}"' in text


def test_headline_and_cards(page):
    assert page.headline == (
        "tiny → tiny+lora: accuracy on Word problems rose from 4.3 % to 75.7 % "
        "and perplexity on English novels rose by 4.4 %.",
    )
    assert [card.figure for card in page.cards] == ["4.3 % → 75.7 %", "+4.4 %", "2 min 23 s"]
    assert [card.style for card in page.cards] == ["better", "worse", ""]


def test_before_after_table(page):
    rows = {row[0].text: [cell.text for cell in row] for row in page.pairs[0].table.rows}
    assert rows["Word problems"][1:6] == ["600", "4.3 %", "75.7 %", "+71.3 points", "+430 / −2"]
    assert rows["Word problems"][-1] == "better"
    assert rows["HellaSwag"][-1] == "worse"
    assert rows["ARC easy"][-1] == rows["CoLA"][-1] == "not shown"
    assert len(page.pairs[0].shown) == 3 and len(page.pairs[0].open) == 3


def test_every_figure_names_its_record(page, study):
    numbers = {f"[{number}]" for number in range(1, 12)}
    for table in (page.pairs[0].table, *(page.section(name).tables[0] for name in ("scores", "solving", "speed"))):
        for row in table.rows:
            marks = set(re.findall(r"\[\d+\]", " ".join(cell.text + cell.note for cell in row)))
            assert marks and marks <= numbers
    files = [row[2].text for row in page.records.rows]
    assert "solve/tiny.json" in files and all((study / file).is_file() for file in files)


def test_a_study_gives_the_command_that_makes_one_record(page):
    commands = {row[2].text: row[3].text for row in page.records.rows}
    assert commands["solve/tiny.json"] == "mambacus solve --model tiny --bench wordproblems"


def test_checks_are_told_and_kept_out_of_the_tables(page):
    assert page.checks == (
        "tiny+lora and tiny+lora (attached) were asked the same 600 problems: "
        "all of their answers are equal to the last character.",
    )
    assert page.section("solving").notes == page.checks
    assert all("attached" not in column for column in page.section("scores").tables[0].columns)
    assert len(page.section("solving").tables[0].rows) == 3


def test_radar_notes_name_what_lies_off_its_axis(page):
    (radar,) = page.radars
    assert len(radar.spokes) == 6
    assert "pythia-tiny on ARC easy: 24.5 % (below chance, drawn at the centre)" in radar.notes


def test_panels_put_better_to_the_right(page):
    for panel in page.pairs[0].panels:
        for bar in panel.bars:
            if bar.row.verdict == "better":
                assert bar.middle > panel.zero
            if bar.row.verdict == "worse":
                assert bar.middle < panel.zero
            assert 0 <= bar.low <= bar.middle <= bar.high <= 100


def test_training_curve_falls_and_stays_in_the_box(page):
    ((curve,),) = (chart.curves for chart in page.section("training").figures[0].charts)
    assert curve.points[0].y < curve.points[-1].y  # y grows downwards
    assert all(0 <= point.x <= 100 and 0 <= point.y <= 100 for point in curve.points)
    assert len(curve.points) <= 400


def test_speed_ratio_and_out_of_memory(page):
    rows = [[cell.text for cell in row] for row in page.section("speed").tables[0].rows]
    assert [row[6] for row in rows[:2]] == ["4.39 ×", "1.00 ×"]
    assert rows[-1][4] == "out of memory"


def test_samples_are_the_first_of_each_outcome(page):
    samples = page.pairs[0].samples
    assert samples.counts == {"gained": 430, "lost": 2, "both right": 24, "both wrong": 144}
    assert [sample.outcome for sample in samples.chosen].count("lost") == 2
    assert [sample.id for sample in samples.chosen][:2] == ["wordproblems-0", "wordproblems-1"]


def test_what_a_model_wrote_cannot_become_markup(tmp_path: Path):
    for label in ("a", "b"):
        file = write_solve(tmp_path / f"{label}.json", label, {"wordproblems": [True, False]})
        items = file.with_suffix(".items.jsonl")
        evil = {"completion": "</pre><script>alert(1)</script>", "question": "<b>'\"&amp;</b>"}
        write_jsonl_atomic(items, [row | evil for _, row in read_jsonl(items)])
    reader = Reader()
    text = render(build(collect([tmp_path])))
    reader.feed(text)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert reader.scripts == 1


def test_a_limit_and_mixed_machines_are_told_first(tmp_path: Path):
    write_evaluate(tmp_path / "a.json", "one", {"arc_easy": {"acc": [1.0, 0.0]}}, limit=2)
    write_solve(tmp_path / "b.json", "one", {"wordproblems": [True]}, limit=1, bench=["wordproblems"])
    notices = build(collect([tmp_path])).notices
    assert notices == ("Only the first 2 items of each task were used in [1] (--limit 2).",)


def test_too_few_axes_make_no_radar(tmp_path: Path):
    write_solve(tmp_path / "a.json", "one", {"wordproblems": [True]})
    page = build(collect([tmp_path]))
    assert page.radars == () and '<section id="shape"' not in render(page)


def test_a_model_without_an_axis_leaves_a_gap(tmp_path: Path):
    full = {name: {"acc": [1.0, 0.0]} for name in ("arc_easy", "winogrande", "piqa")}
    write_evaluate(tmp_path / "a.json", "one", full)
    write_evaluate(tmp_path / "b.json", "two", {name: full[name] for name in ("arc_easy", "winogrande")})
    (radar,) = build(collect([tmp_path])).radars
    assert [polygon.closed for polygon in radar.polygons] == [True, False]
    assert "polyline" in render(build(collect([tmp_path])))


def test_what_speaks_for_gain_and_cost_is_fixed_by_rule(tmp_path: Path):
    solved = {"gsm8k": coin(200, 0.1, 1), "svamp": coin(200, 0.1, 2)}
    better = {"gsm8k": flip(solved["gsm8k"], 3, 0), "svamp": flip(solved["svamp"], 90, 0)}
    for label, answers, shift in (("base", solved, 0.0), ("tuned", better, 9.0)):
        write_solve(tmp_path / f"s-{label}.json", label, answers)
        items = {
            "lambada_standard": {"perplexity": [[-2.0, 1], [-3.0, 1]] * 20},
            "wikitext": {"word_perplexity": texts(30, 3.0, 1, shift=shift)},
        }
        write_evaluate(tmp_path / f"e-{label}.json", label, items)
    (sentence,) = build(collect([tmp_path]), pairs=["base=tuned"]).headline
    assert "accuracy on GSM8K shows no difference" in sentence  # not SVAMP, which gained most
    assert sentence.endswith("perplexity on WikiText became 8.1e+03 times as high.")


def test_many_models_share_colours_by_place_in_their_group(tmp_path: Path):
    labels = [f"{size} {name}" for size in ("small", "large") for name in ("mamba", "pythia", "opt", "neo")]
    tasks = {name: {"acc": [1.0, 0.0]} for name in ("arc_easy", "winogrande", "piqa")}
    for label in labels:
        write_evaluate(tmp_path / f"{label}.json", label, tasks)
    models = [{"label": label, "role": "baseline", "group": label.split()[0]} for label in labels]
    results = {"title": "t", "models": models, "steps": [], "substitutions": []}
    write_record(tmp_path / "study.json", record("study", "s", {}, results))
    page = build(collect([tmp_path]))
    assert [radar.title for radar in page.radars] == ["small", "large"]
    assert page.colours["small opt"] == page.colours["large opt"]
    assert page.cards == () and page.headline == ()
