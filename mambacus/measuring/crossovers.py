"""Where one implementation overtakes another as sequences get longer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

HIGHER_IS_BETTER = {
    "tokens_per_second": True,
    "peak_memory_bytes": False,
    "state_bytes": False,
    "energy_joules": False,
}
_GROUP = ("benchmark", "batch", "dtype", "graph", "method", "new_tokens")

Row = dict[str, Any]


def crossovers(rows: Sequence[Row], ours: str = "mambacus") -> list[dict[str, Any]]:
    """Return the lengths at which ``ours`` becomes better or worse than each peer.

    Between two measured lengths the logarithm of the ratio is taken to be linear in the logarithm of the length.

    Args:
        rows: bench rows with ``seqlen``; a row with ``error`` is no point of the curve but is named in the note.
        ours: the implementation that the others are compared with.

    Returns:
        For each benchmark, batch, dtype, mode, number of new tokens, metric and peer one entry a crossing, or one with
        ``seqlen`` null if there is none: ``{benchmark, batch, dtype, graph, method, new_tokens, metric, ours, peer,
        seqlen, note}``.
    """
    found = []
    for group in _unique(tuple(row.get(name) for name in _GROUP) for row in rows):
        members = [row for row in rows if tuple(row.get(name) for name in _GROUP) == group]
        peers = _unique(row["implementation"] for row in members if row["implementation"] != ours)
        for peer, metric in itertools.product(peers, HIGHER_IS_BETTER):
            head = dict(zip(_GROUP, group, strict=True)) | {"metric": metric, "ours": ours, "peer": peer}
            found += [head | entry for entry in _compare(members, metric, ours, peer)]
    return found


def _compare(rows: Sequence[Row], metric: str, ours: str, peer: str) -> list[dict[str, Any]]:
    """Return ``seqlen`` and ``note`` of every crossing of one metric."""
    values = {name: _curve(rows, name, metric) for name in (ours, peer)}
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    lengths = sorted(values[ours].keys() & values[peer].keys())
    if not lengths:
        return []
    lead = [sign * math.log(values[ours][length] / values[peer][length]) for length in lengths]
    failures = _failures(rows, (ours, peer))
    entries = []
    for (length, here), (after, there) in itertools.pairwise(zip(lengths, lead, strict=True)):
        if (here > 0) == (there > 0):
            continue
        share = here / (here - there)
        seqlen = math.exp(math.log(length) + share * (math.log(after) - math.log(length)))
        entries.append({"seqlen": round(seqlen, 1), "note": f"{ours if there > 0 else peer} is better above{failures}"})
    if entries:
        return entries
    better = ours if lead[0] > 0 else peer if lead[0] < 0 else "neither"
    return [{"seqlen": None, "note": f"{better} is better at all of {lengths[0]} to {lengths[-1]}{failures}"}]


def _curve(rows: Sequence[Row], name: str, metric: str) -> dict[int, float]:
    return {row["seqlen"]: row[metric] for row in rows if row["implementation"] == name and row.get(metric)}


def _failures(rows: Sequence[Row], names: tuple[str, str]) -> str:
    """Return the errors of both sides, to be appended to a note."""
    return "".join(
        f"; {row['implementation']} at {row['seqlen']}: {row['error']}"
        for row in rows
        if row["implementation"] in names and row.get("error")
    )


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
