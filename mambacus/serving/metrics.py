"""Figures of a running server, in Prometheus' text format."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of observations below fixed bounds."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the lines of the text format."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server counts itself.

    Attributes:
        requests: answers by (path, status).
        first_token: seconds from a request's arrival to its first token.
        duration: seconds of whole requests.
        failed: requests that the model gave no completion for.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token = Histogram()
        self.duration = Histogram()
        self.failed = 0

    def text(self, gauges: dict[str, tuple[str, str, float]]) -> str:
        """Return the text format.

        Args:
            gauges: name -> (type, help, value) of what others count.
        """
        lines = [
            "# HELP mambacus_requests_total Answers by path and status.",
            "# TYPE mambacus_requests_total counter",
            *(
                f'mambacus_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ),
        ]
        for name, text, histogram in (
            ("mambacus_time_to_first_token_seconds", "Arrival to first token.", self.first_token),
            ("mambacus_request_seconds", "Whole requests.", self.duration),
        ):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram", *histogram.lines(name)]
        for name, (kind, text, value) in gauges.items():
            lines += [f"# HELP mambacus_{name} {text}", f"# TYPE mambacus_{name} {kind}", f"mambacus_{name} {value}"]
        return "\n".join(lines) + "\n"
