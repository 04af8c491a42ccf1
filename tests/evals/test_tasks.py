"""Our YAMLs are lm_eval's own definitions over local rows: same prompts byte for byte, same metrics, same defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from mambacus.evals import math
from mambacus.evals.catalogue import LOCAL_TASKS, load_tasks
from mambacus.runtime.errors import UserError

INSTALLED = Path(lm_eval.tasks.__file__).parent
DEFINITIONS = {
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "cola": "glue/cola/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "piqa": "piqa/piqa.yaml",
}
SOLVED = ["svamp", "asdiv", "mawps", "aqua", "mathqa_gen", "math", "math500", "gsm_hard", "wordproblems"]
SOURCE_KEYS = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset"}
# Without a local training split, worked examples come from another one.
WITHOUT_TRAINING = {"wikitext", "hellaswag", "mathqa", "winogrande", "piqa"}


def plain(value: Any) -> Any:
    """Compare functions by file and name: lm_eval loads a definition's functions more than once."""
    return (Path(value.__code__.co_filename).name, value.__qualname__) if callable(value) else value


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definition_is_the_installed_one(name: str) -> None:
    ours = load_yaml(LOCAL_TASKS / f"{name}.yaml")
    theirs = load_yaml(INSTALLED / DEFINITIONS[name])
    if name in WITHOUT_TRAINING:
        theirs.pop("training_split")
    if name == "wikitext":
        theirs.pop("validation_split")
    if "samples" in (ours.get("fewshot_config") or {}):
        ours["fewshot_config"]["samples"] = ours["fewshot_config"]["samples"]()
    keys = (ours.keys() | theirs.keys()) - SOURCE_KEYS
    different = {key for key in keys if plain(ours.get(key)) != plain(theirs.get(key))}
    assert not different


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("shots", [0, 2])
def test_prompts_are_those_of_the_installed_definition(name: str, shots: int, small_data: Path) -> None:
    """The installed definition, given documents in the published form, asks the same requests."""
    (ours,), _ = load_tasks([name], small_data)
    definition = load_yaml(INSTALLED / DEFINITIONS[name]) | {"custom_dataset": lambda **_: ours.dataset}
    missing = {
        key for key in ("training_split", "validation_split") if definition.get(key) not in {None, *ours.dataset}
    }
    theirs = ConfigurableTask(config={key: v for key, v in definition.items() if key not in {"tag", *missing}})
    requests = []
    for task in (ours, theirs):
        task.config.num_fewshot = 0 if name == "wikitext" else shots
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=6)
        requests.append([request.args for request in task.instances])
    assert requests[0] == requests[1]
    assert len(requests[0]) >= 6
    assert ours.config.repeats == theirs.config.repeats


def test_known_prompts(small_data: Path) -> None:
    tasks = {task.config.task: task for task in load_tasks(["gsm8k", "piqa", "hellaswag", "winogrande"], small_data)[0]}
    for task in tasks.values():
        task.config.num_fewshot = 0
        task.build_all_requests(limit=1)
    gsm8k = tasks["gsm8k"]
    assert gsm8k.dataset["train"][0]["answer"] == (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
    )
    assert gsm8k.instances[0].args[0].endswith("at the farmers' market?\nAnswer:")
    assert gsm8k.dataset["test"][0]["answer"].endswith("\n#### 18")
    piqa = [request.args for request in tasks["piqa"].instances]
    assert piqa[0][0] == "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    assert piqa[0][1].startswith(" Provide the guinea pig with a cage")
    assert tasks["hellaswag"].instances[0].args == (
        "Roof shingle removal: A man is sitting on a roof. He",
        " is using wrap to wrap a pair of skis.",
    )
    assert [request.args for request in tasks["winogrande"].instances] == [
        ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
        ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
    ]


@pytest.mark.parametrize("name", SOLVED)
def test_benches_ask_and_grade_as_solve_does(name: str, small_data: Path) -> None:
    (task,), _ = load_tasks([name], small_data)
    problems = math.load_problems(name, small_data, None, 0)
    for shots in (0, min(2, len(task.dataset["train"]))):  # of MATH's first rows none has a solution
        task.config.num_fewshot = shots
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=3)
        for request, problem in zip(task.instances, problems, strict=False):
            text, settings = request.args
            assert text.endswith(math.prompt(problem, "cot")) and text.count("Question: ") >= shots + 1
            assert settings["until"] == [*math.STOPS]
            right, wrong = f" so\n#### {problem.answer}", " I do not know"
            assert task.process_results(request.doc, [right]) == {"accuracy": 1.0, "parsed": 1.0}
            assert task.process_results(request.doc, [wrong]) == {"accuracy": 0.0, "parsed": 0.0}


@pytest.mark.slow
def test_plain_lm_eval_runs_them(checkpoint: Any, small_data: Path, tmp_path: Path) -> None:
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={checkpoint.folder},dtype=float32,max_length=512",
        "--tasks", "svamp,math,aqua", "--include_path", str(LOCAL_TASKS), "--limit", "2", "--device", "cpu",
        "--metadata", json.dumps({"data_dir": str(small_data)}), "--gen_kwargs", "max_gen_toks=8",
        "--output_path", str(tmp_path),
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "svamp" in ended.stdout and "accuracy" in ended.stdout


def test_gsm8k_takes_five_shots_by_default(small_data: Path) -> None:
    (task,), _ = load_tasks(["gsm8k"], small_data)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("Question: ") == 6
    assert prompt.count("\n#### ") == 5


def test_unknown_and_repeated_tasks_are_named(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'helaswag'; did you mean 'hellaswag'\?"):
        load_tasks(["arc_easy", "helaswag"], data_dir)
    with pytest.raises(UserError, match="arc_easy given more than once"):
        load_tasks(["arc_easy", "arc_easy"], data_dir)
    with pytest.raises(UserError, match="at least one task"):
        load_tasks([], data_dir)


def test_a_tag_gives_all_its_tasks(small_data: Path) -> None:
    tasks, _ = load_tasks(["ai2_arc"], small_data)
    assert {task.config.task for task in tasks} == {"arc_easy", "arc_challenge"}


def write_cola(folder: Path, lines: list[str]) -> Path:
    for split in ("train", "validation"):
        path = folder / "zeroshot" / "cola" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"sentence": "Fine.", "label": 1}', "{broken"], r"train.jsonl, line 2: not valid JSON"),
        (['{"sentence": "Fine."}'], r"train.jsonl, line 1: no label; the row has sentence"),
        ([""], r"train.jsonl: no rows"),
    ],
)
def test_faults_in_the_data_are_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks(["cola"], write_cola(tmp_path, lines))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tasks(["cola"], tmp_path / "absent")
    with pytest.raises(UserError, match="cannot read"):
        load_tasks(["cola"], tmp_path)


def test_documents_are_read_without_a_cache(tmp_path: Path) -> None:
    row = {"sentence": "Fine.", "label": 1}
    load_tasks(["cola"], write_cola(tmp_path, [json.dumps(row)]))
    changed = [json.dumps(row | {"sentence": "Changed."})]
    (task,), _ = load_tasks(["cola"], write_cola(tmp_path, changed))
    assert task.dataset["validation"][0]["sentence"] == "Changed."


def test_no_way_to_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks as installed

    class Offline(installed.TaskManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**({"include_path": LOCAL_TASKS, "include_defaults": False} | options))

        def load(self, task_list: Any) -> Any:
            raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(installed, "TaskManager", Offline)
    with pytest.raises(UserError, match=r"--tasks cola: no documents from the hub .*; try --data-dir"):
        load_tasks(["cola"], None)
