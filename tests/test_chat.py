"""The verb ``chat``."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mambacus.cli import main
from mambacus.runtime.records import read_record

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
MODEL = ["--model", "random:micro", "--device", "cpu"]
LETTERS = [f"--logit-bias={','.join(f'{token}=-1000' for token in range(512) if not 67 <= token <= 90)}"]


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def chat(template: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Hold a conversation of given lines; return status, answers and what else was said."""

    def run(lines: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        words = ["chat", *MODEL, *LETTERS, "--chat-template", template, "--max-new-tokens", "6", *flags]
        status = main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_lines_are_answered_and_turns_counted(chat: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    status, said, notes = chat(
        "Hello\n\n/stats\nMore.\n/stats\n/quit\nnever asked\n", "--system", "Add.", "--out", str(out)
    )
    results = read_record(out).results
    answers = [message["content"] for message in results["messages"] if message["role"] == "assistant"]
    assert status == 0 and said == "".join(answer + "\n" for answer in answers) and len(answers) == 2
    assert results["messages"][0] == {"role": "system", "content": "Add."}
    first, second = (len(text) for text in ("system:Add.\nuser:Hello\nassistant:", "x\nuser:More.\nassistant:"))
    assert [(turn["read"], turn["again"]) for turn in results["turns"]] == [(first, 0), (second, 0)]
    assert f"last turn: {first} tokens read (0 of them again), 6 generated (length)" in notes
    assert f"conversation: {first + 5 + second + 5} tokens read" in notes
    assert results["prompt_tokens"] == first + second


def test_a_conversation_is_saved_and_gone_on_with(chat: Any, tmp_path: Path) -> None:
    state, out = tmp_path / "s", tmp_path / "r.json"
    _, whole, _ = chat("Hello\nMore.\n")
    assert chat("Hello\n", "--save-state", str(state))[0] == 0
    _, rest, _ = chat("More.\n", "--state", str(state), "--out", str(out))
    assert whole.endswith(rest) and len(read_record(out).results["messages"]) == 4
    assert read_record(out).results["prompt_tokens"] == len("x\nuser:More.\nassistant:")
    status, again, _ = chat(f"Hello\n/save {tmp_path / 't'}\n/reset\nOther\n/load {tmp_path / 't'}\nMore.\n")
    assert status == 0 and again.splitlines()[-1] + "\n" == rest
    status, _, error = chat(f"Hello\n/save {state}\n")
    assert status == 2 and f"/save {state}: exists already; add --overwrite" in error
    assert chat(f"Hello\n/save {state}\n", "--overwrite")[0] == 0


def test_a_system_message_that_would_be_ignored_is_refused(chat: Any, tmp_path: Path) -> None:
    state = tmp_path / "s"
    assert chat("Hello\n", "--save-state", str(state), "--system", "Add.")[0] == 0
    status, said, error = chat("More.\n", "--state", str(state), "--system", "Shout.")
    assert status == 2 and not said and error.count("\n") == 1
    assert f"--system: {state} holds a conversation that did not begin so" in error
    assert chat("More.\n", "--state", str(state), "--system", "Add.")[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/lod x", "unknown command '/lod'; did you mean '/load'? (a question that begins with / needs a space"),
        ("/xyzzy", "unknown command '/xyzzy'; known: /save, /load, /reset"),
        ("/load", "/load: expected a file name"),
        ("/load gone.state", "gone.state"),
        ("/save new.state", "new.state: nothing to save: nothing was said yet"),
    ],
)
def test_faults_of_commands_end_a_script(chat: Any, line: str, message: str) -> None:
    status, said, error = chat(f"{line}\nHello\n")
    assert status == 2 and message in error and error.count("\n") == 1 and not said


def test_a_person_may_go_on_after_a_fault(template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mambacus.chat import Config, run

    config = Config(model="random:micro", device="cpu", chat_template=Path(template), max_new_tokens=2)
    said: list[str] = []
    record = run(config, iter(["/load gone", " /etc is a folder?"]), said.append, forgive=True)
    assert capsys.readouterr().err.startswith("error: cannot read the state gone") and said[-1] == "\n"
    assert record.results["messages"][0]["content"] == " /etc is a folder?"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat-template", "gone"], "--chat-template gone: No such file"),
        (["--state", "gone"], "gone"),
        (["--temperature", "-1"], "--temperature: expected 0 or more"),
        (["--save-state", "."], "--save-state .: expected a file, got a folder"),
    ],
)
def test_faults_of_flags_are_one_line(chat: Any, flags: list[str], message: str) -> None:
    status, said, error = chat("Hello\n", *flags)
    assert status == 2 and message in error and error.count("\n") == 1 and not said


def test_a_model_without_a_template_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *MODEL]) == 2
    assert "--model random:micro: the model's tokenizer has no chat template" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mambacus.chat import _typed

    typed = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "Hello", EOFError()])

    def ask(prompt: str) -> str:
        found = next(typed)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("builtins.input", ask)
    assert list(_typed()) == ["Hello"] and "expected UTF-8 text, got other bytes" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_not_the_program(template: str, tmp_path: Path) -> None:
    keys, screen = pty.openpty()  # a terminal: questions are asked for, faults forgiven
    command = [sys.executable, "-m", "mambacus", "chat", *MODEL, "--chat-template", template, *LETTERS]
    out = tmp_path / "r.json"
    with subprocess.Popen(
        [*command, "--max-new-tokens", "10000000", "--out", str(out)], stdin=screen, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        os.write(keys, b"Hello\n")
        got = b""
        while len(got) < 60 and (part := os.read(process.stdout.fileno(), 4096)):
            got += part
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # at the question: the line is taken back
        time.sleep(0.3)
        os.write(keys, b"/quit\n")
        process.communicate(timeout=20)
    os.close(keys)
    os.close(screen)
    assert process.returncode == 0
    results = json.loads(out.read_text())["results"]
    assert [turn["finish_reason"] for turn in results["turns"]] == ["cancelled"]
    assert len(results["messages"][1]["content"]) == results["turns"][0]["generated"] > 30
