"""States of texts that were read before, so that a prompt which begins with one is read from there."""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mambacus.models import MambaState

LEAST_TOKENS = 16  # a shorter common beginning is not worth a state


@dataclasses.dataclass(frozen=True)
class Entry:
    """One text that was read.

    Attributes:
        tokens: the text.
        state: the state after it, one row.
        logits: the logits after it, float32 (1, vocabulary), or None where they were not computed.
    """

    tokens: array[int]
    state: MambaState
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the entry."""
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.state.nbytes + logits + self.tokens.itemsize * len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to read a prompt.

    Attributes:
        entry: the longest cached beginning of the prompt, None if there is none.
        branch: where the prompt leaves another that was read, if that is worth a state of its own, else None.
    """

    entry: Entry | None
    branch: int | None


class PrefixCache:
    """A bounded set of states; the least recently used leaves first.

    A recurrent state can be gone on from only where it was taken, unlike a Transformer's cache, which can be cut
    anywhere. So a state is kept at the end of every prompt and completion, and where a prompt turns out to leave an
    earlier one: the end of a system prompt that two conversations share, for example.

    Args:
        capacity_bytes: most bytes of states, logits and tokens together.

    Attributes:
        hits: prompts that began with a cached text.
        misses: prompts that did not.
        tokens_saved: tokens that were not read again.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.nbytes = 0
        self.hits = self.misses = self.tokens_saved = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def plan(self, tokens: Sequence[int]) -> Plan:
        """Return the longest cached text that ``tokens`` begins with, and where to take a state on the way.

        A cached text equal to ``tokens`` counts if its logits were kept.
        """
        wanted = torch.tensor(tokens)
        best: Entry | None = None
        branch = 0
        for entry in self._entries.values():
            common = _common(wanted, entry.tokens)
            whole = common == len(entry.tokens) and (common < len(tokens) or entry.logits is not None)
            if whole and (best is None or common > len(best.tokens)):
                best = entry
            branch = max(branch, min(common, len(tokens) - 1))
        at = len(best.tokens) if best else 0
        if best is None:
            self.misses += 1
        else:
            self.hits += 1
            self.tokens_saved += at
            self._entries.move_to_end(best.tokens.tobytes())
        return Plan(best, branch if branch - at >= LEAST_TOKENS else None)

    def add(self, tokens: Sequence[int], state: MambaState, logits: Tensor | None = None) -> None:
        """Keep the state (one row) after ``tokens``, and the logits if there are any."""
        key = array("q", tokens)
        known = self._entries.pop(key.tobytes(), None)
        if known is not None:
            self.nbytes -= known.nbytes
            logits = known.logits if logits is None else logits
        # Copies: a row of a batch would keep the whole batch alive.
        entry = Entry(key, state.select([0]), None if logits is None else logits.clone())
        if entry.nbytes > self.capacity_bytes:
            return
        self._entries[key.tobytes()] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.capacity_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes


def _common(wanted: Tensor, tokens: array[int]) -> int:
    """Return the length of the common beginning."""
    length = min(len(wanted), len(tokens))
    if length == 0 or wanted[0] != tokens[0]:
        return 0
    differ = (wanted[:length] != torch.frombuffer(tokens, dtype=torch.int64)[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
