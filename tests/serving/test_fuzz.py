"""Requests that schemathesis derives from the server's own schema: answers as described, never 5xx, never a hang."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/health", "/metrics")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
)  # fmt: skip


def fuzz(url: str, examples: int, mode: Any) -> dict[int, int]:
    """Send so many requests to every path; return how often each status came back."""
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(PATHS)
    wanted = [checks.CHECKS.get_one(name) for name in CHECKS]
    statuses: dict[int, int] = {}
    for operation in operations:
        if operation.method == "get" and mode != schemathesis.GenerationMode.POSITIVE:
            continue  # nothing in it can be wrong

        @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            answer = case.call(timeout=30)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            case.validate_response(answer, checks=wanted)

        send()
    return statuses


@pytest.mark.slow
def test_requests_that_fit_the_schema(server: Any) -> None:
    assert fuzz(server.url, 6, schemathesis.GenerationMode.POSITIVE)[200] > 2


def test_requests_that_do_not(server: Any) -> None:
    assert fuzz(server.url, 12, schemathesis.GenerationMode.NEGATIVE)[400] > 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_requests(server: Any) -> None:
    for mode in schemathesis.GenerationMode:
        print(fuzz(server.url, 500, mode))
