"""What a user can get wrong, verb by verb: one line that names the thing, exit status 2, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus import cli
from mambacus.models import load, save

GOOD_ROW = '{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'
READERS: dict[str, tuple[str, ...]] = {  # verbs that read weights, with what else they need
    "generate": ("--prompt", "x"),
    "evaluate": ("--tasks", "text_sample", "--out", "{tmp}/e.json"),
    "solve": ("--bench", "wordproblems", "--out", "{tmp}/s.json"),
    "finetune": ("--data", "{data}", "--out", "{tmp}/run"),
    "merge": ("--adapter", "{adapter}", "--out", "{tmp}/merged"),
    "convert": ("--out", "{tmp}/c"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another of its shape, an adapter for the first and its data; no test changes them."""
    folder = tmp_path_factory.mktemp("shared")
    model, tokenizer = load("random:micro")
    save(model, folder / "model", tokenizer)
    torch.manual_seed(7)
    model.init_weights()
    save(model, folder / "other", tokenizer)
    (folder / "data.jsonl").write_text(GOOD_ROW * 3)
    made = cli.main(
        ["finetune", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--max-steps", "1",
         "--device", "cpu", "--out", str(folder / "run")]
    )  # fmt: skip
    assert made == 0
    return folder


@pytest.fixture
def fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must fail as a user's fault does; return its message."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MAMBACUS_DEBUG", raising=False)
    places = {
        "tmp": tmp_path, "shared": shared, "model": shared / "model", "data": shared / "data.jsonl",
        "adapter": shared / "run" / "adapter",
    }  # fmt: skip

    def run(*argv: object) -> str:
        words = [str(part).format(**places) for part in argv]
        before = contents(tmp_path), contents(shared)
        capsys.readouterr()
        status = cli.main(words)
        captured = capsys.readouterr()
        assert status == 2, captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith(f"mambacus {words[0]}: error: ")
        assert captured.out == ""
        assert (contents(tmp_path), contents(shared)) == before
        return captured.err

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its bytes, None for folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def broken(tmp_path: Path, shared: Path) -> Callable[[str, bytes], Path]:
    """Copy the model with one of its files changed."""

    def copy(name: str, content: bytes) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shared / "model", folder)
        (folder / name).write_bytes(content)
        return folder

    return copy


# Models


@pytest.mark.parametrize("verb", READERS)
def test_a_model_that_is_nowhere(fails: Callable[..., str], verb: str) -> None:
    message = fails(verb, *READERS[verb], "--model", "nowhere/at/all")
    assert "model 'nowhere/at/all': no such folder" in message
    assert "not to be had from the model hub" in fails(verb, *READERS[verb], "--model", "no/such-model")
    assert "did you mean 'tiny'" in fails(verb, *READERS[verb], "--model", "tinny")


@pytest.mark.parametrize("verb", READERS)
def test_folders_that_are_no_models(
    fails: Callable[..., str], broken: Callable[[str, bytes], Path], verb: str, shared: Path
) -> None:
    words = (verb, *READERS[verb], "--model")
    assert "it is a fine-tuning run" in fails(*words, "{shared}/run")
    assert "it is an adapter" in fails(*words, "{adapter}")
    assert "expected a folder, got a file" in fails(*words, "{data}")
    assert "config.json: not valid JSON" in fails(*words, broken("config.json", b"\xff\xfe{"))
    weights = shared / "model" / "model.safetensors"
    for content in (b"", weights.read_bytes()[:1000], bytes(100)):
        folder = broken(weights.name, content)
        assert f"{folder / weights.name}: corrupt or truncated" in fails(*words, folder)
    (folder / weights.name).unlink()
    assert f"{folder}: no weights" in fails(*words, folder)


@pytest.mark.parametrize("verb", READERS)
def test_tokenizers_that_are_missing_or_broken(
    fails: Callable[..., str], broken: Callable[[str, bytes], Path], verb: str
) -> None:
    folder = broken("tokenizer.json", b"{}")
    assert f"{folder}: its tokenizer cannot be read" in fails(verb, *READERS[verb], "--model", folder)
    for file in folder.glob("token*"):
        file.unlink()
    assert f"{folder}: no tokenizer beside the model" in fails(verb, *READERS[verb], "--model", folder)


@pytest.mark.parametrize("verb", ["generate", "evaluate", "solve", "merge"])
def test_an_adapter_for_another_model(fails: Callable[..., str], verb: str) -> None:
    words = [*READERS[verb], "--model", "{shared}/other"]
    if "--adapter" not in words:
        words += ["--adapter", "{adapter}"]
    message = fails(verb, *words)
    assert "made for" in message and "does not fit" in message
    words[words.index("--adapter") + 1] = "{shared}/nothing"
    assert "nothing: no such folder" in fails(verb, *words)


# Words and numbers


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_names_what_it_does_not_know(fails: Callable[..., str], verb: str) -> None:
    words = (verb, "optimise") if verb == "prompt" else (verb,)
    assert "unknown flag --no-such-flag" in fails(*words, "--no-such-flag")
    assert "no such file: " in fails(*words, "-c", "{tmp}/nothing.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("finetune", "--modle", "x"), "unknown flag --modle; did you mean '--model'"),
        (("evaluate", "--limit", "0"), "--limit: expected 1 or more, got 0"),
        (("evaluate", "--limit", "half"), "--limit: expected int, got 'half'"),
        (("evaluate", "--tasks", "text_sampel", "--data-dir", "{tmp}"), "did you mean 'text_sample'"),
        (("evaluate", "--tasks", "text_sample", "--data-dir", "{tmp}/gone"), "gone: no such folder"),
        (("evaluate", "--tasks", "wikitext", "--data-dir", "{tmp}"), "wikitext/test.jsonl: No such file"),
        (("evaluate", "--seed", "-1"), "--seed: expected 0 or more"),
        (("evaluate", "--dtype", "float23"), "did you mean 'float32'"),
        (("solve", "--bench", "wordproblem"), "did you mean 'wordproblems'"),
        (("solve", "--temperature", "nan"), "--temperature: expected 0 or more, got nan"),
        (("solve", "--bench", "gsm8k", "--data-dir", "{tmp}"), "gsm8k/test.jsonl"),
        (("generate", "--top-k", "-1"), "--top-k: expected 0 or more, got -1"),
        (("generate", "--dtype", "float23"), "--dtype: expected one of float32, bfloat16, float16, got 'float23'"),
        (("generate", "--device", "gpu"), "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("finetune", "--lr", "inf"), "--lr: expected 0 or more, got inf"),
        (("finetune", "--method", "lroa"), "--method: expected one of lora"),
        (("convert", "--to", "onnx"), "--to: expected one of hf, original, got 'onnx'"),
        (("merge", "--dtype", "int8"), "--dtype: expected one of"),
    ],
)
def test_values_that_cannot_be(fails: Callable[..., str], argv: tuple[str, ...], message: str) -> None:
    verb, *flags = argv
    needed = [*READERS[verb], "--model", "{model}"]
    for flag in {flag for flag in flags if flag.startswith("--")} & {*needed}:  # the wrong value for the right one
        place = needed.index(flag)
        del needed[place : place + 2]
    assert message in fails(verb, *needed, *flags)


@pytest.mark.parametrize("verb", ["info", *READERS])
def test_a_gpu_that_is_not_there(fails: Callable[..., str], verb: str) -> None:
    if torch.cuda.is_available() or verb == "convert":
        pytest.skip("there is a GPU, or the verb takes no device")
    model = ("{model}",) if verb == "info" else ("--model", "{model}", *READERS[verb])
    assert "sees no CUDA device here; use --device cpu" in fails(verb, *model, "--device", "cuda")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("rang: 4", "unknown key 'rang'; did you mean 'rank'"),
        ("rank: many", "key 'rank': expected int, got 'many'"),
        ("rank: -1", "--rank: expected 1 or more, got -1"),
        ("lr: .nan", "--lr: expected 0 or more, got nan"),
        ("loss: al", "--loss: expected one of answer, full"),
        ("out: null", "key 'out': expected Path, got None"),
        ("rank: 4\nrank: 8", "found the key 'rank' twice"),
        ("- rank", "expected keys and values, got a list"),
    ],
)
def test_settings_in_yaml(fails: Callable[..., str], tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    words = (*READERS["finetune"], "--model", "{model}")
    assert message in fails("finetune", *words, "-c", "{tmp}/c.yaml")


# Data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD_ROW * 16 + '{"question": \n', "line 17: not valid JSON"),
        (GOOD_ROW + '{"question": "What?"}\n', "line 2: missing key 'answer'"),
        (GOOD_ROW + '{"question": "  ", "answer": "3"}\n', "line 2: question is empty"),
        (GOOD_ROW + "[1, 2]\n", "line 2: expected a JSON object"),
        ("", "rows.jsonl: no rows"),
        ("\n\n", "rows.jsonl: no rows"),
        (GOOD_ROW.encode("utf-16"), "not UTF-8 text"),
        (bytes(range(256)), "not UTF-8 text"),
        ("question,answer\nWhat?,2\n", "line 1: not valid JSON"),
    ],
)
def test_bad_data_is_named_by_line(
    fails: Callable[..., str], tmp_path: Path, content: str | bytes, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fails("finetune", "--model", "{model}", "--data", "{tmp}/rows.jsonl", "--out", "{tmp}/run")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gone.jsonl", "cannot read gone.jsonl"),
        ("{tmp}", "expected a JSONL file, got a folder"),
        ("gsm8k", "--data-dir: missing"),
        ("gsm9k", "did you mean 'gsm8k'"),
        ("wordproblems:none", "expected a number of rows"),
    ],
)
def test_data_that_is_no_file(fails: Callable[..., str], data: str, message: str) -> None:
    assert message in fails("finetune", "--model", "{model}", "--data", data, "--out", "{tmp}/run")


# Outputs


@pytest.mark.parametrize("verb", [verb for verb in READERS if verb != "generate"])
def test_places_that_cannot_be_written(fails: Callable[..., str], tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    words = [*READERS[verb], "--model", "{model}"]
    out = words.index("--out") + 1
    for place in ("file", "folder", "file/deeper", "file/deeper/still"):
        words[out] = f"{{tmp}}/{place}"
        message = fails(verb, *words)
        assert message.startswith(f"mambacus {verb}: error: --out {tmp_path / 'f'}"), message


def test_a_folder_of_another_run_is_kept(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": "finetune", "identity": {"seed": 5}}))
    for extra in ([], ["--resume"]):
        message = fails("finetune", "--model", "{model}", "--data", "{data}", "--out", "{tmp}/run", *extra)
        assert "holds another run" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("report", "{tmp}/nothing.json", "--out", "{tmp}/r.html"), "cannot read"),
        (("report", "{tmp}", "--out", "{tmp}/r.html"), "found none"),
        (("report", "{shared}/run/record.json", "--out", "{shared}/run/record.html"), "which is no report's"),
        (("study", "nowhere.yaml", "--out", "{tmp}/study"), "no such recipe: nowhere.yaml"),
        (("study", "dmeo", "--out", "{tmp}/study"), "did you mean 'demo'"),
        (("study", "demo", "--out", "{data}"), "expected a folder, got a file"),
        (("study", "demo", "--out", "{shared}/run"), "holds a run of another kind"),
        (("demo", "--out", "{shared}/run"), "holds a run of another kind"),
        (("demo", "--model", "{tmp}", "--out", "{tmp}/demo"), "not a model folder"),
        (("demo", "--limit", "-1"), "--limit: expected 0 or more"),
        (("pretrain", "--data-dir", "{tmp}", "--out", "{tmp}/p"), "missing books_train_1.jsonl.gz"),
        (("pretrain", "--data-dir", "{tmp}", "--out", "{tmp}/p", "--steps", "0"), "--steps: expected 1 or more"),
        (("bench", "trian", "--out", "{tmp}/b.json"), "did you mean 'train'"),
        (("bench", "prefil"), "got 'prefil'; did you mean 'prefill'"),
        (("bench", "foo"), "WHAT: expected one of train, decode, prefill, lengths, scan, eval, got 'foo'"),
        (("bench", "train", "--out", "{data}"), "add --overwrite"),
        (("info",), "missing MODEL"),
        (("info", "{model}", "extra"), "unexpected 'extra'"),
        (("info", "random:7b"), "expected random:SIZE"),
        (("bench", "generation", "--model", "nowhere/at/all", "--out", "{tmp}/b.json"), "--data-dir: missing"),
        (("bench", "generation", "--model", "{model}", "--out", "{data}"), "add --overwrite"),
    ],
)
def test_the_other_verbs(fails: Callable[..., str], argv: tuple[Any, ...], message: str) -> None:
    assert message in fails(*argv)
