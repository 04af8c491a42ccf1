"""A server under load for minutes: no error, no wrong text, flat memory.

Starts ``mambacus serve`` as a process of its own, keeps 64 streams open at once (clients that ask again as soon as they
have their answer; prompts, lengths and sampling vary, seeds are given), compares every text with what the engine gives
offline, and watches the server's memory. Writes one JSON record of kind ``serve-soak`` and fails if a request failed, a
text was wrong or memory grew.

    python benchmarks/serve_soak.py --out soak.json                  # five minutes on two cores, tiny
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Stopwatch, write_record

KINDS = 256  # different requests, so that all can be completed offline beforehand
MARGIN = 3e-5  # of a logit: batches of other sizes round differently, by about 3e-6
ALLOWED_GROWTH = 0.05  # of the server's memory, from the first half to the second


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the soak."""

    out: Path = opt(help="record to write", metavar="FILE.json")
    model: str = opt("tiny", help="tiny, a model folder, a hub id or random:SIZE")
    seconds: float = opt(300.0, help="seconds of load", above=0)
    streams: int = opt(64, help="streams open at once", least=1)
    prefix_cache_mb: int = opt(64, help="megabytes of the server's prefix cache; it should fill early", least=0)
    overwrite: bool = opt(False, help="replace an existing record")


@dataclasses.dataclass
class Seen:
    """What the clients saw."""

    requests: int = 0
    tokens: int = 0
    wrong: list[int] = dataclasses.field(default_factory=list)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    first_token: list[float] = dataclasses.field(default_factory=list)
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)


def body(kind: int) -> dict[str, Any]:
    """Return one of the requests."""
    return {
        "prompt": f"Question: Anna has {kind} coins and {'very ' * (kind % 37)}many friends.\nAnswer:",
        "max_tokens": 4 + kind % 29,
        "temperature": [0, 0.7, 1.1][kind % 3],
        "top_p": [1, 0.9][kind % 2],
        "seed": kind,
        "stop": [["\n\n"], []][kind % 2],
    }


def offline(model_name: str) -> dict[int, str]:
    """Return the text that each request must be answered with: kind -> text, without those that rounding decides."""
    from mambacus.inference import Engine, SamplingParams
    from mambacus.models import load

    bodies = [body(kind) for kind in range(KINDS)]
    params = [
        SamplingParams(
            max_new_tokens=one["max_tokens"], temperature=one["temperature"], top_p=one["top_p"], seed=one["seed"],
            stop=one["stop"],
        )
        for one in bodies
    ]  # fmt: skip
    engine = Engine(*load(model_name, "cpu"))
    requests = engine.requests([one["prompt"] for one in bodies], params)
    completions = engine.generate([request.ids for request in requests], params)
    texts = {}
    for kind, (request, [completion]) in enumerate(zip(requests, completions, strict=True)):
        if clear(engine.model, request, completion.token_ids):
            texts[kind] = completion.text
    return texts


def clear(model: Any, request: Any, tokens: list[int]) -> bool:
    """Return whether every token would also have been chosen from logits that differ by some `MARGIN`."""
    import torch

    from mambacus.inference.sampling import choose_tokens

    read = [*request.ids, *tokens[:-1]]
    with torch.inference_mode():
        logits = model(torch.tensor([read])).logits[0, len(request.ids) - 1 :]
    source, noise = request.generator(0), torch.Generator().manual_seed(0)
    draws = torch.tensor([source.random() for _ in tokens], dtype=torch.float64)
    return all(
        choose_tokens(logits + shift * torch.randn(logits.shape, generator=noise), request.params, draws).tolist()
        == tokens
        for shift in (0.0, MARGIN, MARGIN, MARGIN)
    )


@contextlib.contextmanager
def server(config: Config) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server; yield its address and its process."""
    command = [sys.executable, "-m", "mambacus", "serve", "--model", config.model, "--port", "0", "--device", "cpu"]
    command += ["--batch-size", str(config.streams), "--prefix-cache-mb", str(config.prefix_cache_mb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise UserError(f"the server ended with status {process.returncode}")


async def load(url: str, process: psutil.Process, config: Config, expected: dict[int, str], seen: Seen) -> None:
    """Keep the streams open for as long as the load lasts."""
    end = time.monotonic() + config.seconds
    limits = httpx.Limits(max_connections=config.streams)
    numbers, kinds = itertools.count(), sorted(expected)

    async def client(http: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            kind = kinds[next(numbers) * 97 % len(kinds)]
            try:
                text = await stream(http, body(kind), seen)
            except (httpx.HTTPError, ValueError) as error:
                seen.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            seen.requests += 1
            if text != expected[kind]:
                seen.wrong.append(kind)

    async def watch() -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            seen.memory.append((time.monotonic() - began, process.memory_info().rss))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await asyncio.gather(watch(), *(client(http) for _ in range(config.streams)))


async def stream(http: httpx.AsyncClient, asked: dict[str, Any], seen: Seen) -> str:
    """Ask once; return the text.

    Raises:
        httpx.HTTPError: no answer, or one that is not 200.
        ValueError: an error in the stream, or a stream that ends early.
    """
    text, began, first, done = "", time.monotonic(), True, False
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/completions", json=asked | options) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first and line:
                seen.first_token.append(time.monotonic() - began)
                first = False
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                part = json.loads(line.removeprefix("data: "))
                if "error" in part:
                    raise ValueError(part["error"]["message"])
                text += "".join(choice["text"] for choice in part["choices"])
                seen.tokens += part.get("usage", {}).get("completion_tokens", 0)
    if not done:
        raise ValueError("the stream ended early")
    return text


def figures(seen: Seen, seconds: float) -> dict[str, Any]:
    """Return the results of the record."""
    latencies, sizes = sorted(seen.first_token), [size for _, size in seen.memory]
    first, second = sizes[len(sizes) // 4 : len(sizes) // 2], sizes[len(sizes) // 2 :]  # the cache has filled by then
    return {
        "requests": seen.requests,
        "errors": dict(seen.errors),
        "wrong_texts": len(seen.wrong),
        "seconds": seconds,
        "requests_per_second": seen.requests / seconds,
        "tokens_per_second": seen.tokens / seconds,
        "first_token_seconds": {
            "median": statistics.median(latencies),
            "p99": latencies[math.ceil(0.99 * len(latencies)) - 1],
            "largest": latencies[-1],
        },
        "memory_bytes": {
            "first": sizes[0],
            "last": sizes[-1],
            "peak": max(sizes),
            "second_quarter": max(first),
            "second_half": max(second),
        },
        "memory_each_second": sizes,
    }


def main(argv: list[str]) -> None:
    """Run the soak, write the record and tell what came of it."""
    config = parse(Config, argv, "serve_soak.py", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch, expected, seen = Stopwatch(), offline(config.model), Seen()
    with server(config) as (url, process):
        began = time.monotonic()
        asyncio.run(load(url, process, config, expected, seen))
        results = figures(seen, time.monotonic() - began)
        results["kinds_of_request"] = len(expected)
        results["metrics"] = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line[:1] != "#"]
    write_record(config.out, watch.record("serve-soak", config.model, config, results))
    memory, latency = results["memory_bytes"], results["first_token_seconds"]
    print(
        f"{results['requests']} requests in {results['seconds']:.0f} s, {len(seen.errors)} kinds of error, "
        f"{results['wrong_texts']} wrong texts, {results['tokens_per_second']:.0f} tokens/s, first token after "
        f"{latency['median']:.3f} s (median), {latency['p99']:.3f} s (p99); memory {memory['first'] >> 20} MiB first, "
        f"{memory['peak'] >> 20} MiB at most, {memory['last'] >> 20} MiB at last"
    )
    grown = memory["second_half"] / memory["second_quarter"] - 1
    if seen.errors or seen.wrong or grown > ALLOWED_GROWTH:
        raise UserError(f"the server failed: errors {dict(seen.errors)}, wrong {seen.wrong[:9]}, memory +{grown:.1%}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        sys.exit(f"serve_soak.py: error: {fault}")
