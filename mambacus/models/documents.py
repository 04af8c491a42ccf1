"""What ``seq_idx`` says of rows that hold several documents: which token is scored on which, and how many were read."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacus.models.state import MambaState

IGNORE_INDEX = -100  # the label of what is not scored, as in torch's cross entropy


def next_labels(labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return the label of each position's next token, -100 where there is none or it is of another document."""
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if seq_idx is not None:
        foreign = (seq_idx[:, 1:] != seq_idx[:, :-1]) | (seq_idx[:, 1:] < 0)
        targets[:, :-1].masked_fill_(foreign, IGNORE_INDEX)
    return targets


def count_tokens(input_ids: Tensor, seq_idx: Tensor | None, state: MambaState | None) -> Tensor:
    """Return how many tokens of its last document each row has read, int64 (batch,)."""
    batch, seqlen = input_ids.shape
    before = torch.zeros(batch, dtype=torch.int64, device=input_ids.device) if state is None else state.tokens
    if seq_idx is None:
        return before + seqlen
    real = seq_idx >= 0
    starts = torch.zeros_like(real)  # where a second or later document of the row begins
    starts[:, 1:] = real[:, 1:] & real[:, :-1] & (seq_idx[:, 1:] != seq_idx[:, :-1])
    in_last = real & (starts.sum(1, keepdim=True) == starts.cumsum(1))
    return in_last.sum(1) + torch.where(starts.any(1), 0, before)
