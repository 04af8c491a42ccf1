"""Shared beginnings of many token sequences, each read once: a trie whose nodes become states.

`shared_prefixes` finds the beginnings worth reading on their own; `walk` reads them from the root down, within a budget
of bytes, and gives for every sequence the state it goes on from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from mambacus.models import MambaState

Tokens = tuple[int, ...]
ReadSegments = Callable[[Sequence[Tokens], MambaState | None], MambaState]


@dataclasses.dataclass(eq=False)
class Prefix:
    """A beginning that several sequences share; the root is the empty one.

    Attributes:
        tokens: all of it, from the first token on.
        members: numbers of the sequences that go on from here without a longer shared beginning.
        children: longer beginnings, each starting with this one.
    """

    tokens: Tokens
    members: list[int] = dataclasses.field(default_factory=list)
    children: list[Prefix] = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> int:
        """Its length in tokens."""
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Fork:
    """Sequences that can go on together, each from a state.

    Attributes:
        members: numbers of the sequences.
        depths: tokens of each that its state has read.
        rows: row of ``state`` that each goes on from.
        state: None where nothing was read; then all ``depths`` are 0.
    """

    members: list[int]
    depths: list[int]
    rows: list[int]
    state: MambaState | None


def shared_prefixes(sequences: Sequence[Tokens], least_saving: int) -> Prefix:
    """Return the root of the trie of beginnings that save at least ``least_saving`` tokens each.

    A beginning saves its tokens beyond its nearest kept ancestor, once for each user (a member or a longer beginning)
    after the first. Every sequence is a member of exactly one node.

    Args:
        sequences: token sequences, also empty and repeated ones.
        least_saving: a node that saves less costs more, in a pass of its own, than it saves.
    """
    root = Prefix(())
    path = [root]  # from the root to the latest leaf
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        tokens = sequences[number]
        _close(path, _common(path[-1].tokens, tokens))
        if path[-1].depth < len(tokens):
            path.append(Prefix(tokens))
        path[-1].members.append(number)
    _close(path, 0)
    _prune(root, least_saving)
    return root


def _close(path: list[Prefix], depth: int) -> None:
    """Shorten ``path`` to ``depth`` tokens, hanging each node it loses below its parent."""
    while path[-1].depth > depth:
        closed = path.pop()
        if path[-1].depth < depth:
            path.append(Prefix(closed.tokens[:depth]))  # the branch between the closed node and the next sequence
        path[-1].children.append(closed)


def _prune(root: Prefix, least_saving: int) -> None:
    """Merge every node that saves too little into its parent."""
    pending = [root]
    while pending:
        node = pending.pop()
        candidates, node.children = node.children, []
        while candidates:
            child = candidates.pop()
            users = len(child.members) + len(child.children)
            if (child.depth - node.depth) * (users - 1) >= max(1, least_saving):
                node.children.append(child)
            else:
                node.members += child.members
                candidates += child.children
        node.members.sort()
        pending += node.children


def _common(one: Tokens, other: Tokens) -> int:
    """Return how many tokens two sequences share at their beginning, by bisection: slices compare fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def levels(root: Prefix) -> int:
    """Return the number of states on the longest way down from the root."""
    deepest, pending = 0, [(root, 0)]
    while pending:
        node, level = pending.pop()
        deepest = max(deepest, level)
        pending += [(child, level + 1) for child in node.children]
    return deepest


def walk(root: Prefix, read: ReadSegments, state_bytes: int, budget: int) -> Iterator[Fork]:
    """Read the trie from the root down and yield its sequences with the states they go on from.

    States are held along one way down only: at most ``budget`` bytes of them, but always one a level.

    Args:
        root: from `shared_prefixes`.
        read: given the tokens of several segments and the states they continue (None: from the start), returns the
            states after them, in the same order.
        state_bytes: size of one row of a state.
        budget: bytes that all states held at once may take.
    """
    at_once = max(1, budget // (max(1, levels(root)) * state_bytes))
    if root.members:
        yield Fork(root.members, [0] * len(root.members), [0] * len(root.members), None)
    pending = [*_chunks([root], None, at_once)]
    while pending:
        nodes, parents, origin = pending.pop()
        segments = [node.tokens[parent:] for node, (parent, _) in zip(nodes, parents, strict=True)]
        start = origin.select([row for _, row in parents]) if origin is not None else None
        state = read(segments, start)
        users = [(row, node, member) for row, node in enumerate(nodes) for member in node.members]
        if users:
            yield Fork(
                [member for _, _, member in users],
                [node.depth for _, node, _ in users],
                [row for row, _, _ in users],
                state,
            )
        pending += _chunks(nodes, state, at_once)


def _chunks(
    nodes: Sequence[Prefix], state: MambaState | None, size: int
) -> Iterator[tuple[list[Prefix], list[tuple[int, int]], MambaState | None]]:
    """Yield the children of ``nodes``, longest segment first, with (depth, row) of each one's parent and the state."""
    children = [(child, (node.depth, row)) for row, node in enumerate(nodes) for child in node.children]
    children.sort(key=lambda pair: pair[0].depth - pair[1][0], reverse=True)
    for begin in range(0, len(children), size):
        chunk = children[begin : begin + size]
        yield [child for child, _ in chunk], [parent for _, parent in chunk], state
