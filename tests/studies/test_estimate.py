"""Estimates: what is counted, what follows from it, and (slow) how near they come to a study that ran."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

import mambacus.evals.tasks
from mambacus import study
from mambacus.evals.math import BENCHES as REAL_BENCHES
from mambacus.models.costs import costs_of
from mambacus.runtime.records import read_record
from mambacus.studies.estimate import Estimate, Speed, estimate_plan, source_of, sources_of
from mambacus.studies.plan import Plan
from mambacus.studies.workload import BENCHES, TASKS, count_rows, token_factor, work_of
from mambacus.study_estimate import count_text, filled, rows, seconds_text

DATA = Path(os.environ.get("MAMBACUS_DATA_DIR", "../shared/data"))
FIGURES = {"copy": 3e10, "call_seconds": 5e-6}
FIGURES |= {f"gemm_float32_{width}": 1e11 for width in (256, 768, 1024, 2048, 2560)}


def plan_of(recipe: str, **settings: object) -> Plan:
    return study.prepare(study.Config(recipe, **settings))[1]


def estimates_of(plan: Plan, factor: float = 1.0, *, bfloat16: bool = False) -> list[Estimate]:
    plan = filled(plan)
    made = sources_of(plan)
    costs = {source_of(step, made): costs_of(source_of(step, made)) for step in plan.steps}
    figures = {name: value / factor if name == "call_seconds" else value * factor for name, value in FIGURES.items()}
    if bfloat16:
        figures |= {name.replace("float32", "bfloat16"): 4 * value for name, value in figures.items() if "gemm" in name}
    return estimate_plan(plan, costs, Speed("cpu", figures, bfloat16))


def test_every_step_of_the_original_study_is_estimated():
    plan = plan_of("cs5242")
    found = estimates_of(plan)
    assert len(found) == len(plan.steps) + 1
    assert not [guess.unknown for guess in found if guess.unknown]
    assert all(guess.seconds and guess.memory_bytes for guess in found[:-1])
    by_name = dict(zip([step.name for step in plan.steps], found, strict=False))
    small, large = (by_name[f"baseline: evaluate mamba-{size}"] for size in ("130m", "1.4b"))
    assert 9 < large.flops / small.flops < 12
    # 200,035 rows of some 300 tokens, twice; forward and backward through frozen weights
    lora = by_name["finetune: finetune mamba-130m+lora"]
    assert lora.tokens == pytest.approx(2 * 200_064 * 300, rel=0.01)
    assert lora.flops == pytest.approx(lora.tokens * 0.26e9 * 2.2, rel=0.02)


def test_a_tuned_model_is_as_large_as_its_base_and_ends_its_answers():
    plan = plan_of("smoke")
    found = dict(zip([step.name for step in plan.steps], estimates_of(plan), strict=False))
    assert found["solve: solve tiny+lora"].tokens < found["baseline: solve tiny"].tokens
    assert found["solve: solve tiny+lora"].tokens == found["check: solve tiny+lora (attached)"].tokens


def test_a_faster_machine_takes_less_time_for_the_same_work():
    plan = plan_of("cs5242", models=("mamba-130m", "pythia-160m"))
    slow, fast = estimates_of(plan), estimates_of(plan, 10.0)
    for before, after in zip(slow[:-1], fast[:-1], strict=True):
        assert (before.flops, before.tokens) == (after.flops, after.tokens)
        assert after.seconds <= before.seconds


def test_training_is_in_bfloat16_where_the_cpu_has_it():
    plan = plan_of("smoke")
    plain, able = estimates_of(plan), estimates_of(plan, bfloat16=True)
    for step, before, after in zip(plan.steps, plain[:-1], able[:-1], strict=True):
        if step.verb == "finetune":
            assert step.config.dtype == "auto"
            assert after.seconds < before.seconds and after.memory_bytes < before.memory_bytes
        else:
            assert after == before


def test_limits_and_local_rows_are_counted(tmp_path):
    (tmp_path / "zeroshot" / "cola").mkdir(parents=True)
    (tmp_path / TASKS["cola"].file).write_text('{"a": 1}\n\n{"a": 2}\n')
    assert count_rows(tmp_path, TASKS["cola"].file, 1043) == 2
    assert count_rows(None, TASKS["cola"].file, 1043) == 1043
    step = next(step for step in plan_of("smoke").steps if step.verb == "evaluate")
    few = dataclasses.replace(step, config=dataclasses.replace(step.config, tasks=("cola",), limit=100))
    here = dataclasses.replace(few, config=dataclasses.replace(few.config, data_dir=tmp_path))
    assert work_of(few, 1.0, ours=True, tuned=False).documents == 100
    assert work_of(here, 1.0, ours=True, tuned=False).documents == 2
    read = [work_of(few, 1.0, ours=ours, tuned=False).read for ours in (True, False)]
    assert read == [100 * 24, 100 * 45]  # shared contexts are read once by ours alone


def test_what_cannot_be_counted_is_unknown_not_zero(tmp_path):
    step = next(step for step in plan_of("smoke").steps if step.verb == "evaluate")
    other = dataclasses.replace(step, config=dataclasses.replace(step.config, tasks=("cola", "mmlu")))
    assert work_of(other, 1.0, ours=True, tuned=False).unknown == "tokens of mmlu"
    plan = dataclasses.replace(plan_of("smoke"), steps=(other,))
    assert estimates_of(plan)[0].seconds is None
    unknown = estimate_plan(plan, {"tiny": None}, Speed("cpu", FIGURES))[0]
    assert unknown == Estimate(unknown="shape of tiny")
    assert rows(plan, [unknown, Estimate(seconds=3.0)])[0][3:] == ("?", "?", "?", "?", "")


def test_the_table_names_the_files_that_the_tasks_read():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    folder = Path(mambacus.evals.tasks.__file__).parent
    for name, task in TASKS.items():
        path = folder / f"{name}.yaml"
        definition = yaml.load(path.read_text(), Loader)
        if "include" in definition:
            definition = yaml.load((folder / definition["include"]).read_text(), Loader) | definition
        settings = definition.get("dataset_kwargs", {})
        files = settings.get("files", {"test": f"math/{settings['bench']}/test.jsonl"} if "bench" in settings else {})
        split = definition.get("test_split") or definition.get("validation_split")
        assert files.get(split, "") == task.file, name
    for name in BENCHES:
        source = REAL_BENCHES[name].source or name
        expected = "" if source == "wordproblems" else f"math/{source}/{REAL_BENCHES[name].split}.jsonl"
        assert BENCHES[name].file == expected
    assert set(BENCHES) == set(REAL_BENCHES)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data folder")
def test_published_sizes_are_those_of_the_data():
    for task in TASKS.values():
        assert count_rows(DATA, task.file, task.documents) == task.documents
    for bench in BENCHES.values():
        assert count_rows(DATA, bench.file, bench.problems) == bench.problems


def test_words():
    assert [seconds_text(value) for value in (0.64, 95, 600, 20000, 9e5)] == [
        "0.6 s",
        "95 s",
        "10 min",
        "5.6 h",
        "10.4 days",
    ]
    assert [count_text(value) for value in (0, 950, 83_020, 1.23e6, 4.5e12, 999_600)] == [
        "0", "950", "83 k", "1.2 M", "4.5 T", "1.0 M",
    ]  # fmt: skip
    assert [token_factor(*each) for each in (("random:tiny", 4096), ("tiny", 4096), ("x", 50280))] == [4.3, 1.35, 1.0]


def test_the_demo_took_about_what_is_estimated_for_its_machine():
    # two cores with 200 GFLOP/s; records of the demo that the repository keeps
    (folder,) = (Path(__file__).parents[2] / "benchmarks").glob("cpu-demo-*")
    plan = plan_of("demo")
    for step, guess in zip(plan.steps, estimates_of(plan, 2.0), strict=False):
        seconds = read_record(folder / step.record.relative_to(plan.out)).seconds
        assert seconds / 2 <= guess.seconds <= 2 * seconds, f"{step.name}: {guess.seconds}, took {seconds}"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no data folder")
@pytest.mark.timeout(1200)
def test_the_smoke_study_takes_about_what_was_estimated(tmp_path):
    study.run(study.Config("smoke", out=tmp_path / "s", data_dir=DATA, device="cpu"))
    stages: dict[str, list[float]] = {}
    for step in read_record(tmp_path / "s" / "study.json").results["steps"]:
        sums = stages.setdefault(step["stage"], [0.0, 0.0])
        sums[0] += step["estimate"]["seconds"]
        sums[1] += step["seconds"]
    for stage, (estimated, measured) in stages.items():
        if measured > 5:  # a shorter stage is start-up
            assert measured / 2 <= estimated <= 2 * measured, f"{stage}: {estimated} s estimated, {measured} s measured"
