"""The verb ``generate``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
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
    argv = ["generate", *MODEL, "--prompt", "A", "--samples", "3", "--temperature", "1.5", "--max-new-tokens", "4"]
    assert main([*argv, "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.count("--- ") == 3
    assert main([*argv, "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main([*argv, "--seed", "4"]) == 0
    assert capsys.readouterr().out != first


def test_every_stop_is_one_string_with_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus import inference

    seen = []

    def keep(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["stop"])
        return original(*args, **kwargs)

    original = inference.SamplingParams
    monkeypatch.setattr(inference, "SamplingParams", keep)
    argv = ["generate", *MODEL, "--prompt", "A", "--max-new-tokens", "1"]
    assert main([*argv, "--stop", r"\n\n", "--stop", ", Q:,"]) == 0
    (tmp_path / "c.yaml").write_text("stop: [', and', '7']\n")
    assert main([*argv, "-c", str(tmp_path / "c.yaml")]) == 0
    (tmp_path / "c.yaml").write_text("stop: ', and'\n")
    assert main([*argv, "-c", str(tmp_path / "c.yaml")]) == 0
    assert main([*argv, "-c", str(tmp_path / "c.yaml"), "--stop=-,-"]) == 0
    assert seen == [("\n\n", ", Q:,"), (", and", "7"), (", and",), ("-,-",)]
    assert main([*argv, "--stop", ""]) == 2 and "stop: expected non-empty strings" in capsys.readouterr().err


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
        (["--save-state", "s", "--samples", "2"], "--save-state keeps one state"),
        (["--device", "gpu"], "--device: expected"),
        (
            ["--prompt-file", "f"],
            "expected one of --prompt, --prompt-file and --prompts, got --prompt and --prompt-file",
        ),
        (["--stream", "--samples", "2"], "--stream shows one completion"),
        (["--logit-bias", "5"], "--logit-bias: expected ID=NUMBER, got '5'"),
        (["--logit-bias", "900=1"], "logit_bias: token id 900"),
        (["--logit-bias", "9=1e9"], "logit_bias: expected numbers within 1e6 of 0"),
        (["--stop", "a<|endoftext|>"], "stop: 'a<|endoftext|>' holds the special token"),
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


def test_text_is_streamed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    from mambacus.generate import Config, run

    pieces: list[str] = []
    config = Config(model="random:micro", device="cpu", prompt="One, two", max_new_tokens=6, temperature=1.0)
    [completion] = run(config, pieces.append).results["completions"]
    assert "".join(pieces) == "One, two" + completion["text"] and len(pieces) == 1 + 6
    outputs = []
    for flag in ("--stream", "--no-stream"):
        assert main(["generate", *MODEL, "--prompt", "One, two", "--max-new-tokens", "6", flag]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_biases_and_scores_reach_the_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    argv = ["generate", *MODEL, "--prompt", "A", "--max-new-tokens", "3", "--logit-bias", "66=1000", "--logprobs", "2"]
    assert main([*argv, "--out", str(out)]) == 0
    [completion] = read_record(out).results["completions"]
    assert completion["token_ids"] == [66, 66, 66]
    assert [(score["token_id"], len(score["top"])) for score in completion["logprobs"]] == [(66, 2)] * 3
    assert all(score["logprob"] < 0 for score in completion["logprobs"])  # the model's own, before the bias
    table = capsys.readouterr().err.splitlines()[:3]
    assert [line.split()[0] for line in table] == ["66"] * 3 and all(line.count(":") == 2 for line in table)


def test_the_saved_state_is_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, state = tmp_path / "r.json", tmp_path / "s"
    argv = ["generate", *MODEL, "--prompt", "One, two", "--max-new-tokens", "4", "--save-state", str(state)]
    assert main([*argv, "--out", str(record)]) == 0
    assert read_record(record).results["prompt_tokens"] == 8 + 1  # the prompt, and the token chosen last
    bias = ["--logit-bias", "0=1000", "--out", str(record), "--overwrite"]
    assert main([*argv, *bias]) == 0  # the end of the text is no part of what is gone on from
    assert read_record(record).results["completions"][0]["finish_reason"] == "eos"
    assert MambaState.load(state).tokens.tolist() == [8]


def test_the_saved_state_has_read_what_was_shown_and_not_the_stop_string(tmp_path: Path) -> None:
    from mambacus.inference import Engine
    from mambacus.models import load
    from mambacus.models.state_files import read_state

    model, tokenizer = load("tiny")
    record, state = tmp_path / "r.json", tmp_path / "s"
    base = ["generate", "--model", "tiny", "--device", "cpu", "--prompt", "The cat", "--max-new-tokens", "12"]
    argv = [*base, "--out", str(record), "--overwrite"]
    assert main(argv) == 0
    text = read_record(record).results["completions"][0]["text"]
    ids = tokenizer("The cat")["input_ids"]
    for stop in (text[9:14], text[-3:-1], "<|padding|>"):
        bias = ["--logit-bias", "1=1000"] if stop == "<|padding|>" else []
        assert main([*argv, "--stop", stop, "--save-state", str(state), *bias]) == 0
        [completion] = read_record(record).results["completions"]
        assert completion["finish_reason"] == "stop"
        found = read_state(state, model, tokenizer)
        assert tokenizer.decode(found.token_ids) == "The cat" + completion["text"]
        assert found.token_ids[: len(ids)] == tuple(ids)
        expected = Engine(model, tokenizer).prefill(found.token_ids)
        assert (found.state.ssm_state - expected.ssm_state).abs().max() < 1e-4
        assert found.state.tokens.tolist() == expected.tokens.tolist() == [len(found.token_ids)]


LINES = """{"prompt": "Tom has 3", "id": {"row": 7}}

{"prompt_ids": [10, 20, 30], "samples": 2, "temperature": 1.3, "seed": 9, "logprobs": 1, "max_new_tokens": 3}
{"prompt": "Caf\\u00e9", "stop": ["e"], "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
 "logit_bias": {"65": -5}, "ignore_eos": true}
""".replace(",\n", ", ")


def test_a_file_of_prompts_gives_each_line_what_it_gets_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.inference import Engine, SamplingParams
    from mambacus.models import load

    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(LINES)
    argv = ["generate", *MODEL, "--max-new-tokens", "5", "--seed", "2"]
    assert main([*argv, "--prompts", str(prompts), "--out", str(out)]) == 0
    engine = Engine(*load("random:micro"))
    expected = [
        engine.generate(["Tom has 3"], SamplingParams(max_new_tokens=5, seed=2))[0],
        engine.generate(
            [[10, 20, 30]], SamplingParams(max_new_tokens=3, temperature=1.3, seed=9, n=2, logprobs=1)
        )[0],
        engine.generate(["Café"], SamplingParams(
            max_new_tokens=5, seed=2, stop=["e"], top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
            logit_bias={65: -5}, ignore_eos=True))[0],
    ]  # fmt: skip
    items = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(item["line"], item["id"], item["prompt_tokens"]) for item in items] == [
        (1, {"row": 7}, 9), (3, None, 3), (4, None, 5),
    ]  # fmt: skip
    for item, completions in zip(items, expected, strict=True):
        assert [one["text"] for one in item["completions"]] == [one.text for one in completions]
        assert [one["finish_reason"] for one in item["completions"]] == [one.finish_reason for one in completions]
        assert [one["token_ids"] for one in item["completions"]] == [one.token_ids for one in completions]
    assert [len(one["logprobs"]) for one in items[1]["completions"]] == [3, 3]
    record = read_record(out.with_suffix(".json"))
    assert record.results["prompts"] == 3 and record.results["failed"] == {}
    assert record.results["prompt_tokens"] == 9 + 3 + 5
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(LINES))
    assert main([*argv, "--prompts", "-"]) == 0
    assert capsys.readouterr().out == out.read_text()
    for taken in (out, out.with_suffix(".json")):
        other = tmp_path / f"{taken.stem}{taken.suffix}"
        assert main([*argv, "--prompts", str(prompts), "--out", str(out)]) == 2
        assert f"--out {other}: exists already" in capsys.readouterr().err
        taken.unlink()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object, got a list"),
        ('{"promt": "a"}', "line 2: unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "a", "n": 2}', "line 2: unknown key 'n'; known: prompt, prompt_ids, id, max_new_tokens"),
        ('{"id": 3}', "line 2: expected either prompt (a text) or prompt_ids"),
        ('{"prompt": "a", "prompt_ids": [1]}', "line 2: expected either prompt"),
        ('{"prompt": 3}', "line 2: prompt: expected a string, got 3"),
        ('{"prompt": "\\ud800"}', "line 2: the prompt holds half of a surrogate pair"),
        ('{"prompt_ids": [1, 900]}', "line 2: token id 900"),
        ('{"prompt_ids": [1.5]}', "line 2: prompt_ids: expected a list of whole numbers"),
        ('{"prompt": "a", "temperature": true}', "line 2: temperature: expected a number, got True"),
        ('{"prompt": "a", "temperature": -1}', "line 2: temperature: expected >= 0, got -1"),
        ('{"prompt": "a", "samples": 1.5}', "line 2: samples: expected a whole number"),
        ('{"prompt": "a", "stop": [1]}', "line 2: stop: expected a string or a list of strings"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "line 2: logit_bias: expected an object"),
        ('{"prompt": "a", "logit_bias": {"1": 1%s}}' % ("0" * 400), "line 2: logit_bias: expected an object"),
        ('{"prompt": "a", "logit_bias": {"1%s": 1}}' % ("0" * 5000), "line 2: logit_bias: expected an object"),
        ('{"prompt": "a", "temperature": 1%s}' % ("0" * 400), "line 2: temperature: expected a number, got 1000"),
        ('{"prompt": "a", "id": ["\\udfff"]}', "line 2: id: holds half of a surrogate pair"),
        ('{"prompt": "a", "logit_bias": {"999": 1}}', "line 2: logit_bias: token id 999"),
    ],
)
def test_a_line_that_cannot_be_honoured_is_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "good"}\n' + line + "\n")
    out = ["--out", str(tmp_path / "o.jsonl")]
    assert main(["generate", *MODEL, "--prompts", str(tmp_path / "p.jsonl"), *out]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "gone.jsonl"], "cannot read gone.jsonl"),
        (["--prompts", "empty.jsonl"], "empty.jsonl: expected one JSON object a line, found none"),
        (["--prompts", "empty.jsonl", "--save-state", "s"], "--save-state keeps one state"),
        (["--prompts", "empty.jsonl", "--stream"], "--stream shows one completion"),
        (["--prompts", "empty.jsonl", "--out", "o.json"], "--out o.json: expected a name that ends in .jsonl"),
        (["--prompt-file", "gone.txt"], "--prompt-file gone.txt: No such file"),
        (["--prompt-file", "bytes"], "--prompt-file bytes: not UTF-8 text"),
        ([], "expected one of --prompt, --prompt-file and --prompts, got none"),
    ],
)
def test_faults_of_files_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"caf\xe9")
    assert main(["generate", *MODEL, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_one_prompt_of_many_may_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambacus.models import MambaConfig, MambaLM
    from mambacus.models.tokenizer import byte_tokenizer

    model, tokenizer = (
        MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=257, tie_embeddings=False)),
        byte_tokenizer(),
    )
    [bad] = tokenizer("b")["input_ids"]
    model.backbone.embeddings.weight.data[bad] = float("nan")
    monkeypatch.setattr("mambacus.models.load", lambda *_, **__: (model, tokenizer))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "ab"}\n')
    out = tmp_path / "o.jsonl"
    argv = ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), "--logit-bias", f"{bad}=-1000"]
    assert main([*argv, "--max-new-tokens", "2"]) == 2
    assert "1 of 2 prompts failed; first, line 2: the model's logits are NaN" in capsys.readouterr().err
    good, failed = (json.loads(line) for line in out.read_text().splitlines())
    assert len(good["completions"]) == 1 and "error" not in good
    assert failed["completions"] == [] and "NaN" in failed["error"]
    assert read_record(out.with_suffix(".json")).results["failed"] == {"2": failed["error"]}


def test_a_file_is_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("One, two, three\n")
    outputs = []
    for prompt in (["--prompt-file", str(tmp_path / "p.txt")], ["--prompt", "One, two, three"]):
        argv = [*prompt, "--max-new-tokens", "6", "--temperature", "1", "--repetition-penalty", "1.3"]
        assert main(["generate", *MODEL, *argv, "--prefill-tokens", "4"]) == 0
        outputs.append(capsys.readouterr().out)
    assert "One, two, three" + outputs[0] == outputs[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_prompt(tmp_path: Path) -> None:
    """A prompt ten times as long needs the same memory, but for its token ids."""
    peaks = []
    for thousands in (20, 200):
        file, out = tmp_path / f"{thousands}.txt", tmp_path / f"{thousands}.json"
        file.write_text("".join(f"{i} little birds sat on the old wall. " for i in range(100 * thousands)))
        command = ["generate", "--prompt-file", str(file), "--max-new-tokens", "1", "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "mambacus", *command, "--out", str(out)], check=True, timeout=250)
        results = read_record(out).results
        assert results["prompt_tokens"] > 1000 * thousands
        peaks.append(results["peak_memory_bytes"])
    assert peaks[1] < peaks[0] + (24 << 20), peaks


def test_a_state_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", *MODEL, "--prompt", "A", "--save-state", str(tmp_path / "s"), "--max-new-tokens", "1"]) == 0
    )
    assert main(["generate", "--model", "random:tiny", "--prompt", "A", "--state", str(tmp_path / "s")]) == 2
    assert "of another model: conv_state: expected shape (8, 1, 512, 4)" in capsys.readouterr().err
