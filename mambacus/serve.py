"""``mambacus serve``: an OpenAI-compatible HTTP server over the engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.flags import weights_flag

if TYPE_CHECKING:
    from mambacus.inference import Engine
    from mambacus.serving.limits import Limits

KEY_VARIABLE = "MAMBACUS_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to serve, where, and how much of it."""

    model: str = opt("tiny", help="tiny, a folder, a hub id or random:SIZE")
    adapter: str | None = opt(None, help="PEFT adapter folder to attach", metavar="DIR")
    state: Path | None = opt(
        None, help="compiled prompt that every request, a whole question, goes on from", metavar="FILE.state"
    )
    name: str | None = opt(None, help="the model's name in the API (default: as --model)")
    host: str = opt("127.0.0.1", help="address to listen on; the default is reached from this machine alone")
    port: int = opt(8000, help="port to listen on; 0: any free one", least=0, most=65535)
    batch_size: int = opt(64, help="completions decoded at once", least=1)
    prefill_tokens: int = opt(512, help="most prompt tokens read between two tokens of the streams", least=1)
    prefix_cache_mb: int = opt(256, help="megabytes of states kept for prompts that begin alike; 0: none", least=0)
    most_waiting: int = opt(256, help="completions that may wait; more are answered 429", least=0)
    most_prompt_tokens: int = opt(65536, help="longest prompt in tokens", least=1)
    most_new_tokens: int = opt(4096, help="longest completion in tokens", least=1)
    most_body_bytes: int = opt(4 << 20, help="largest request body in bytes", least=1)
    body_seconds: float = opt(10.0, help="longest time for the head of a request to arrive, and for its body", above=0)
    request_seconds: float = opt(300.0, help="longest time of one request, until its answer was read", above=0)
    drain_seconds: float = opt(30.0, help="after SIGTERM, time for open requests to finish", least=0)
    api_key_file: Path | None = opt(
        None, help=f"file with the key clients must send; or ${KEY_VARIABLE}", metavar="FILE"
    )
    chat_template: Path | None = opt(None, help="Jinja template instead of the tokenizer's own", metavar="FILE")
    device: str = opt("auto", help="auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", help="dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = weights_flag()
    tokenizer: str | None = opt(None, help="tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, help="data folder with tokenizer/20B_tokenizer.json", metavar="DIR")


def build(config: Config) -> tuple[Any, Engine]:
    """Return the ASGI application and its engine.

    Raises:
        UserError: a package, model, state, key or template that is not there; a state of another model.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install 'mambacus[serve]'")
    key = _key(config)
    from mambacus.inference import Engine
    from mambacus.inference.chat_template import load_template
    from mambacus.models import load
    from mambacus.models.primed import PrimedModel
    from mambacus.models.state_files import read_state
    from mambacus.runtime.device import resolve_device, resolve_dtype
    from mambacus.serving.app import create_app
    from mambacus.serving.metrics import Metrics
    from mambacus.serving.service import Service

    model, tokenizer = load(
        config.model, resolve_device(config.device), resolve_dtype(config.dtype), config.adapter,
        weights=config.weights, tokenizer=config.tokenizer, data_dir=config.data_dir,
    )  # fmt: skip
    primed = PrimedModel(model, read_state(config.state, model, tokenizer).state) if config.state else model
    engine = Engine(
        primed, tokenizer, batch_size=config.batch_size, prefill_tokens=config.prefill_tokens,
        prefix_cache_bytes=config.prefix_cache_mb << 20,
    )  # fmt: skip
    service = Service(engine, Metrics(), config.most_waiting)
    template = load_template(tokenizer, config.chat_template)
    return create_app(service, config.name or config.model, template, limits(config), key), engine


def limits(config: Config) -> Limits:
    """Return what one request may take."""
    from mambacus.serving.limits import Limits

    return Limits(
        config.most_body_bytes, config.body_seconds, config.most_prompt_tokens, config.most_new_tokens,
        config.batch_size + config.most_waiting, config.request_seconds,
    )  # fmt: skip


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then let open requests finish.

    Raises:
        UserError: as `build`; or the address cannot be had.
    """
    app, engine = build(config)
    from mambacus.serving.server import serve

    if config.host not in _LOOPBACK and _key(config) is None:
        print(f"mambacus serve: warning: {config.host} is open to others and no key is asked for", file=sys.stderr)
    warm_up(engine)
    serve(app, limits(config), config.host, config.port, config.drain_seconds)


def warm_up(engine: Engine) -> None:
    """Complete a few short prompts, so that no client waits for kernels to be compiled or graphs to be recorded."""
    from mambacus.inference import SamplingParams
    from mambacus.inference.decoder import BUCKETS

    on_gpu = next(engine.model.parameters()).is_cuda
    for prompts in sorted({*BUCKETS, engine.batch_size}) if on_gpu else (1, 3):
        if prompts > engine.batch_size:
            continue
        list(engine.generate([[0] * 40] * prompts, SamplingParams(max_new_tokens=3, ignore_eos=True)))


def _key(config: Config) -> str | None:
    """Return the key, without space around it as clients send it, or None if none is asked for."""
    if config.api_key_file is not None:
        where, key = f"--api-key-file {config.api_key_file}", _read(config.api_key_file, "--api-key-file")
    elif KEY_VARIABLE in os.environ:
        where, key = KEY_VARIABLE, os.environ[KEY_VARIABLE]
    else:
        return None
    lines = key.strip().splitlines()
    if len(lines) != 1:
        raise UserError(f"{where}: expected a key, got {f'{len(lines)} lines' if lines else 'nothing'}")
    return lines[0]


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not UTF-8 text") from None


def main(argv: Sequence[str]) -> None:
    """Run the verb."""
    run(parse(Config, argv, "mambacus serve", __doc__ or ""))
