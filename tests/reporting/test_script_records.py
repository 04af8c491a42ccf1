"""Records of the scripts in ``benchmarks/`` and of ``bench eval``: drawn as tables, or listed with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import record, write_record, write_solve

from mambacus.reporting.page import Page, build, render
from mambacus.reporting.sources import collect
from mambacus.reporting.table import Table

TIMED = {"graph_ms": 2.0, "step_ms": 2.5, "queued_ms": 0.25, "recording_seconds": 1.0, "kernels": []}
TILING = {"m_tiles": 1, "warps": 8, "ring": 8, "min_blocks": 2}


def page_of(folder: Path, results: dict, kind: str = "bench") -> Page:
    write_record(folder / "a.json", record(kind, "gpu", {}, results))
    return build(collect([folder]), root=folder)


def table(page: Page, name: str) -> Table:
    (found,) = [table for table in page.tables if table.name == name]
    assert name in render(page)
    return found


def texts(found: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_cases_of_the_decoding_script(tmp_path):
    errors = {part: {"fused": 0.005, "modules": 0.006} for part in ("logits", "conv_state", "ssm_state")}
    kernels = [
        {"kernel": "in", "what": "torch", "us": 14.0, "gb_s": 2400},
        {"kernel": "in", "what": TILING | {"chosen": True}, "us": 13.5, "gb_s": 2475},
        {"kernel": "in", "what": TILING | {"chosen": False}, "us": 13.0, "gb_s": 2500},
        {"kernel": "in", "what": TILING | {"chosen": False}, "error": "no room"},
        {"kernel": "update", "what": {"projects": False}, "us": 2.7, "gb_s": 194},
    ]
    seconds = {"seconds": 0.5, "prefill_seconds": 0.1, "first_run_seconds": 1.5, "decode_ms_a_token": 3.0}
    rows = [
        {"case": "step:1.4b:8", "result": {"floor_ms": 1.0, "few": TIMED, "modules": TIMED | {"graph_ms": 4.0}}},
        {"case": "check:1.4b:8", "result": {**errors, "right": True, "same_argmax": 1.0}},
        {"case": "kernels:1.4b:8", "result": kernels},
        {"case": "engine:1.4b:8:2048:128", "result": {"tokens_per_second": 2048.0, **seconds}},
        {
            "case": "host:130m:1:16:256",
            "result": {"greedy": {"tokens_per_second": 3400.0, "token_us": 250.0, "host_us": 50.0, "waits_us": 200.0}},
        },
        {"case": "host:1.4b:1:16:256", "result": {"error": "no room"}},
        *({"case": f"{case}", "result": {"error": "no room"}} for case in ("step:2.8b:1", "engine:2.8b:1:16:16")),
    ]
    page = page_of(tmp_path, {"rows": rows, "ceilings": {"copy_gb_s": 2894.0, "float32_gemm_gflop_s": None}})
    assert texts(table(page, "gpu-step")) == [
        ["1.4b", "8", "fused", "2 ms", "2.5 ms", "0.25 ms", "1 ms", "50.0 %"],
        ["1.4b", "8", "modules", "4 ms", "2.5 ms", "0.25 ms", "1 ms", "25.0 %"],
        ["2.8b", "1", "", "no room", "", "", "", ""],
    ]
    assert texts(table(page, "gpu-engine"))[0] == [
        "1.4b", "8", "2,048 + 128", "2,048", "3 ms", "500 ms", "100 ms", "1,500 ms",
    ]  # fmt: skip
    assert texts(table(page, "gpu-engine"))[1][3] == "no room"
    assert texts(table(page, "gpu-host")) == [
        ["130m", "1", "16 + 256", "greedy", "3,400", "0.25 ms", "0.05 ms", "0.2 ms"],
        ["1.4b", "1", "16 + 256", "no room", "", "", "", ""],
    ]
    assert texts(table(page, "gpu-step-check")) == [["1.4b", "8", "5.00e-03", "5.00e-03", "5.00e-03", "100.0 %", "yes"]]
    assert texts(table(page, "gpu-step-kernels")) == [
        ["1.4b", "8", "in (1 launches failed)", "13.50 µs", "13.00 µs", "14.00 µs"],
        ["1.4b", "8", "update, alone", "2.70 µs", "", ""],
    ]
    assert texts(table(page, "ceilings"))[0][2:] == ["2.89 TB/s"]
    assert page.undrawn.rows == ()


def test_the_training_script_tells_where_the_time_goes(tmp_path):
    row = {"case": "lora-graph:1.4b:4x2048", "ms": 172.0, "tokens_per_second": 47504, "peak_gib": 22.3,
           "queued_ms": 5.21, "busy_ms": 171.0, "launches": 3059,
           "kernels": [{"name": "k" * 90, "calls": 48, "ms": 49.4}]}  # fmt: skip
    page = page_of(tmp_path, {"rows": [row]})
    (cells,) = table(page, "speed").rows
    assert [cell.text for cell in cells][:4] == ["train LoRA", "mambacus, graph", "mixed", "4 × 2,048"]
    (cells,) = texts(table(page, "gpu-profile"))
    assert cells[1:5] == ["172 ms", "5.21 ms", "171 ms", "3,059"] and cells[5] == "k" * 59 + "… 49.4 ms in 48"


def test_cases_that_later_scripts_measured(tmp_path):
    errors = {part: {"fused": 0.005, "modules": 0.006} for part in ("logits", "conv_state", "ssm_state")}
    checked = {**errors, "right": True, "same_argmax": 1.0}
    timed = {"host_ms": 35.0, "wall_ms": 36.0}
    kernels = [
        {"kernel": "in", "what": "torch", "us": 14.0, "gb_s": 2400},
        {"kernel": "in", "what": TILING | {"chosen": True}, "us": 13.5, "gb_s": 2475},
        {"kernel": "in", "what": {"m_tiles": 4, "splits": 1, "chosen": True}, "us": 23.0, "gb_s": 1400},
        {"kernel": "delta", "what": {}, "us": 4.25, "gb_s": 243},
    ]
    run = {"what": "lora float32", "loss": 2e-7, "weight": 1e-4, "right": True, "processes": 2, "peak_gib": 1.5}
    rows = [
        {"case": "check:1.4b:64", "result": {"right": False, "few": checked, "wide": checked | {"right": False}}},
        {"case": "prefill:1.4b:1:16",
         "result": {"eager": timed, "graph": timed | {"host_ms": 1.5}, "logits_differ": 0.0}},
        {"case": "prefill:2.8b:1:16", "result": {"error": "no room"}},
        {"case": "kernels:1.4b:64", "result": kernels},
        {"case": "graph:1.4b:4x2048:again:one-set", "ms": 186.0, "tokens_per_second": 44044, "peak_gib": 30.0},
        run | {"kind": "one", "loss": 0.0, "weight": 0.0, "processes": 1, "peak_gib": 3.0},
        run | {"kind": "shared then one", "processes": 1}, run | {"kind": "whole", "right": False},
    ]  # fmt: skip
    page = page_of(tmp_path, {"rows": rows})
    assert [[row[2], row[-1]] for row in texts(table(page, "gpu-step-check"))] == [["few", "yes"], ["wide", "no"]]
    assert texts(table(page, "gpu-prefill")) == [
        ["1.4b", "1 × 16", "eager", "35 ms", "36 ms", "–"],
        ["1.4b", "1 × 16", "graph", "1.5 ms", "36 ms", "0"],
        ["2.8b", "1 × 16", "no room", "", "", ""],
    ]
    assert texts(table(page, "gpu-step-kernels")) == [
        ["1.4b", "64", "in", "13.50 µs", "–", "14.00 µs"],
        ["1.4b", "64", "in, wide", "23.00 µs", "–", "14.00 µs"],
        ["1.4b", "64", "delta", "4.25 µs", "–", "–"],
    ]
    assert texts(table(page, "speed"))[0][1] == "mambacus, again, one-set, graph"
    assert texts(table(page, "two-gpus")) == [
        ["lora float32", "one GPU", "1", "–", "–", "3 GiB", "–"],
        ["lora float32", "FSDP2 then one GPU", "1", "2.0e-07", "1.0e-04", "1.5 GiB", "yes"],
        ["lora float32", "DDP", "2", "2.0e-07", "1.0e-04", "1.5 GiB", "no"],
    ]
    assert page.undrawn.rows == ()


def test_the_fastest_launch_stands_for_its_kernel(tmp_path):
    launches = [
        {"shape": [8, 1536, 2048], "kernel": "forward", "plan": [4, 32, 4, 2048], "ms": 0.25},
        {"shape": [8, 1536, 2048], "kernel": "forward", "plan": [4, 16, 4, 2048], "ms": 0.5},
    ]
    shape = "(8, 1536, 2048)"
    results = {"launches": launches, "kernels": {shape: {"scan_forward": 201.2}}, "others": {shape: {"conv": 0.045}}}
    assert texts(table(page_of(tmp_path, results), "gpu-launches")) == [
        ["8 × 1,536 × 2,048", "scan, forward", "0.25 ms", "launch 4, 32, 4, 2048; 2 compared, the slowest 0.5 ms"],
        ["8 × 1,536 × 2,048", "scan_forward", "201.2 µs", "in one forward and backward pass"],
        ["8 × 1,536 × 2,048", "conv", "0.045 ms", "the op alone"],
    ]


def test_evaluations_have_a_table_of_their_own(tmp_path):
    ours = {
        "benchmark": "eval", "task": "arc_easy", "num_fewshot": 0, "implementation": "mambacus", "model": "tiny",
        "documents": 400, "dtype": "float32", "device": "cpu", "seconds": 4.0, "documents_per_second": 100.0,
        "tokens_read": 25_000, "tokens_naive": 80_000, "metrics": {"acc": 0.25}, "seqlen": 50, "batch": 64,
    }  # fmt: skip
    slow = ours | {"implementation": "hf", "speedup": 2.0, "same_documents": 399, "compared_documents": 400}
    failed = {key: ours[key] for key in ("benchmark", "task", "model", "dtype")}
    rows = [ours, slow, failed | {"implementation": "hf", "error": "out of memory"}]
    page = page_of(tmp_path, {"rows": rows})
    assert [found.name for found in page.section("speed").tables] == ["evaluation-speed"]
    first, second, third = texts(table(page, "evaluation-speed"))
    assert first[:7] == ["arc_easy", "mambacus", "float32", "400", "4.0 s", "100", "25,000"]
    assert second[7:9] == ["2.00 ×", "399 of 400"] and third[4] == "out of memory"
    assert page.undrawn.rows == ()


@pytest.mark.parametrize(
    ("kind", "results", "reason"),
    [
        ("nosuch", {}, "records of kind nosuch have no part on a page of this version"),
        ("info", {}, "it describes a model and measures nothing"),
        ("bench", {"rows": []}, "it holds no measured case that a section draws"),
        ("bench", {"rows": [{"case": "odd"}]}, "it holds no measured case that a section draws"),
        (
            "bench", {"rows": [{"case": "odd"}], "ceilings": {"copy_gb_s": 30.0}},
            "1 rows of another kind than a section draws: odd",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [True, False])
def test_what_is_not_drawn_is_listed_with_its_reason(tmp_path, kind, results, reason, named):
    write_solve(tmp_path / "b.json", "one", {"gsm8k": [True, False]})
    write_record(tmp_path / "a.json", record(kind, "it", {}, results))
    page = build(collect([tmp_path / "a.json", tmp_path / "b.json"] if named else [tmp_path]), root=tmp_path)
    assert texts(page.undrawn) == [["[1]", kind, reason]]
    assert reason in render(page)


def test_the_records_of_pages_are_passed_over_so_that_a_glob_may_match_them(tmp_path):
    write_solve(tmp_path / "b.json", "one", {"gsm8k": [True, False]})
    write_record(tmp_path / "page.json", record("report", "page", {}, {}))
    assert [source.path.name for source in collect(sorted(tmp_path.glob("*.json")))] == ["b.json"]
