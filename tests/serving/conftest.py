"""A server on a free port, with the embedded model."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are an extra: pip install 'mambacus[serve]'")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclasses.dataclass(frozen=True)
class Running:
    """Where a server listens, and its engine."""

    url: str
    port: int
    engine: Any


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Running]]:
    """Start servers with given settings; all stop at the end."""
    import uvicorn

    from mambacus.serve import Config, build, limits
    from mambacus.serving.server import settings

    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def begin(**flags: Any) -> Running:
        config = Config(device="cpu", **flags)
        app, engine = build(config)
        server = uvicorn.Server(settings(app, limits(config), port=0, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 120
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        running.append((server, thread))
        return Running(f"http://127.0.0.1:{port}", port, engine)

    yield begin
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(20)


@pytest.fixture(scope="session")
def server(start: Callable[..., Running], template: Path) -> Running:
    return start(chat_template=template, most_new_tokens=64, most_prompt_tokens=512, most_body_bytes=50_000)


@pytest.fixture(scope="session")
def offline() -> Any:
    """An engine of its own with the same model."""
    from mambacus.inference import Engine
    from mambacus.models import load

    return Engine(*load("tiny"))
