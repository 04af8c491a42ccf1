"""The external proposer against a small server of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mambacus.prompts import Exemplar, Prompt
from mambacus.prompts.journal import Journal
from mambacus.prompts.proposer import KeptProposals, Proposer
from mambacus.prompts.search import Standing
from mambacus.runtime.errors import UserError

BEST = Prompt(instruction="Old.", exemplars=(Exemplar("1?", " #### 1"),))
STANDINGS = [Standing(BEST, -1.5, 8, "random"), Standing(Prompt(), -2.0, 8, "default")]


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.server.seen = (self.path, dict(self.headers), json.loads(self.rfile.read(length)))  # type: ignore[attr-defined]
            status, body = self.server.answer  # type: ignore[attr-defined]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: Any) -> None:
            return None

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def proposer(server: HTTPServer) -> Proposer:
    return Proposer(f"http://127.0.0.1:{server.server_port}/v1/", "small", count=2)


def chat(content: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}}]}


def test_instructions_stand_at_the_head_of_the_leader(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server.answer = (200, chat('```json\n["New one.", "", 3, "New one.", " Two. ", "Three."]\n```'))
    found = proposer(server)(STANDINGS)
    assert [prompt.instruction for prompt in found] == ["New one.", "Two."]
    assert all(prompt.exemplars == BEST.exemplars for prompt in found)
    path, headers, body = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer a-key"
    assert body["model"] == "small" and '-1.500  "Old."' in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}), "answered 500"),
        ((200, {"error": "x"}), "not a chat completion"),
        ((200, chat("I cannot.")), "expected a JSON list of instructions"),
    ],
)
def test_other_answers_are_one_line(server: Any, answer: Any, message: str) -> None:
    server.answer = answer
    with pytest.raises(UserError, match=message):
        proposer(server)(STANDINGS)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://127.0.0.1:port/v1"])
def test_no_server_and_no_port_are_named(url: str) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        Proposer(url, "m")(STANDINGS)


def test_proposals_are_asked_for_once_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([[BEST], UserError("--proposer x: answered 500")])

    def propose(standings: Sequence[Standing]) -> list[Prompt]:
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    first = KeptProposals(propose, Journal(tmp_path / "j", {}, resume=False))
    assert [first(STANDINGS), first(STANDINGS)] == [[BEST], []]
    assert "warning: --proposer x: answered 500; this round has no proposals" in capsys.readouterr().err
    again = KeptProposals(propose, Journal(tmp_path / "j", {}, resume=True))
    assert [again(STANDINGS), again(STANDINGS)] == [[BEST], []] and not capsys.readouterr().err
