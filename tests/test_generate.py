"""The verb ``generate``."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mambacus.cli import main
from mambacus.models import MambaState
from mambacus.runtime.records import read_record

MODEL = ["--model", "random:micro", "--device", "cpu"]


def test_prints_prompt_and_completion_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    argv = ["generate", *MODEL, "--prompt", "2+2=", "--max-new-tokens", "5", "--temperature", "1", "--out", str(out)]
    assert main(argv) == 0
    record = read_record(out)
    [completion] = record.results["completions"]
    captured = capsys.readouterr()
    assert captured.out == "2+2=" + completion["text"] + "\n"
    assert "5 tokens" in captured.err
    assert len(completion["token_ids"]) == record.results["generated_tokens"] == 5
    assert (record.kind, record.label, record.results["prompt_tokens"]) == ("generate", "random:micro", 4)


def test_reads_the_prompt_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for prompt in ("-", "7 apples"):
        monkeypatch.setattr("sys.stdin", io.StringIO("7 apples\n"))
        assert main(["generate", *MODEL, "--prompt", prompt, "--max-new-tokens", "4"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_saved_state_goes_on_where_the_text_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, record = tmp_path / "s", tmp_path / "r.json"
    first = ["generate", *MODEL, "--prompt", "One, two,", "--max-new-tokens", "3"]
    assert main([*first, "--save-state", str(state), "--out", str(record)]) == 0
    said = read_record(record).results["completions"][0]["token_ids"]
    assert MambaState.load(state).tokens.tolist() == [9 + 3]
    again = ["generate", *MODEL, "--max-new-tokens", "6", "--out", str(record), "--overwrite"]
    assert main([*again, "--prompt", " four", "--state", str(state)]) == 0
    continued = read_record(record).results["completions"]
    text = "One, two," + _decode(said) + " four"
    assert main([*again, "--prompt", text]) == 0
    assert read_record(record).results["completions"] == continued
    capsys.readouterr()


def _decode(ids: list[int]) -> str:
    from mambacus.models.tokenizer import byte_tokenizer

    return byte_tokenizer().decode(ids)


def test_several_samples_are_numbered_and_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", *MODEL, "--prompt", "A", "--n", "3", "--temperature", "1.5", "--max-new-tokens", "4"]
    assert main([*argv, "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.count("--- ") == 3
    assert main([*argv, "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main([*argv, "--seed", "4"]) == 0
    assert capsys.readouterr().out != first


def test_stop_understands_escapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mambacus import inference

    seen = []

    def keep(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["stop"])
        return original(*args, **kwargs)

    original = inference.SamplingParams
    monkeypatch.setattr(inference, "SamplingParams", keep)
    assert main(["generate", *MODEL, "--prompt", "A", "--stop", r"\n\n,Q:", "--max-new-tokens", "1"]) == 0
    assert seen == [["\n\n", "Q:"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere/to/be"], "no such folder"),
        (["--temperature", "-1"], "--temperature: expected 0 or more, got -1.0"),
        (["--top-p", "nan"], "--top-p: expected more than 0 and at most 1, got nan"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected 1 or more, got 0"),
        (["--prompt", "caf\udce9"], "--prompt: expected UTF-8 text"),
        (["--state", "missing.state"], "missing.state"),
        (["--adapter", "missing"], "--adapter missing: no such folder"),
        (["--save-state", "s", "--n", "2"], "--save-state keeps one state"),
        (["--device", "gpu"], "--device: expected"),
    ],
)
def test_faults_are_one_line_and_exit_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *MODEL, "--prompt", "A", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_text_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["generate", *MODEL, "--prompt", "-"]) == 2
    assert "--prompt: expected UTF-8 text, got other bytes" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--save-state"])
def test_no_file_is_overwritten_unasked(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f").write_text("precious")
    argv = ["generate", *MODEL, "--prompt", "A", "--max-new-tokens", "1"]
    assert main([*argv, flag, str(tmp_path / "f")]) == 2
    assert f"{flag} {tmp_path / 'f'}: exists already; add --overwrite" in capsys.readouterr().err
    assert main([*argv, flag, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path}: expected a file, got a folder" in capsys.readouterr().err
    assert (tmp_path / "f").read_text() == "precious"
    assert main([*argv, flag, str(tmp_path / "f"), "--overwrite"]) == 0
    assert (tmp_path / "f").read_bytes() != b"precious"


def test_a_state_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", *MODEL, "--prompt", "A", "--save-state", str(tmp_path / "s"), "--max-new-tokens", "1"]) == 0
    )
    assert main(["generate", "--model", "random:tiny", "--prompt", "A", "--state", str(tmp_path / "s")]) == 2
    assert "of another model: conv_state: expected shape (8, 1, 512, 4)" in capsys.readouterr().err
