"""A model that begins every document from a given state instead of from nothing: a prompt it has always read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambacus.models.mamba import MambaLM, MambaOutput
from mambacus.models.state import MambaState


class PrimedModel(nn.Module):
    """Wraps a model; what it reads without a state, it reads after ``start``.

    Whatever takes a `MambaLM` or a ``PeftModel`` around one takes it too: `Engine`, the evaluation, the trainer.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one.
        start: the state of one row.
        trained: make the state's two tensors parameters (float32); the model's own are left as they are.

    Raises:
        ValueError: the state does not fit the model, or has not one row.
    """

    def __init__(self, model: nn.Module, start: MambaState, *, trained: bool = False) -> None:
        super().__init__()
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        misfit = start.fits(base.config) or (f"expected 1 row, got {start.batch}" if start.batch != 1 else None)
        if misfit:
            raise ValueError(f"start: {misfit}")
        self.model = model
        self.base = [base]  # in a list: registered once, under self.model
        start = start.detach().to(base.device, torch.float32 if trained else base.dtype)
        self.register_buffer("tokens", start.tokens.clone())
        if trained:
            self.conv_state = nn.Parameter(start.conv_state.clone())
            self.ssm_state = nn.Parameter(start.ssm_state.clone())
        else:
            self.register_buffer("conv_state", start.conv_state)
            self.register_buffer("ssm_state", start.ssm_state)

    @property
    def config(self) -> Any:
        """Configuration of the wrapped `MambaLM`."""
        return self.base[0].config

    def get_base_model(self) -> MambaLM:
        """Return the wrapped `MambaLM` (the name PEFT uses)."""
        found: MambaLM = self.base[0]
        return found

    def start(self, batch: int = 1) -> MambaState:
        """Return the state documents begin from, for ``batch`` rows."""
        return MambaState(self.conv_state, self.ssm_state, self.tokens).fork(batch)  # type: ignore[arg-type]

    def forward(
        self, input_ids: Tensor, seq_idx: Tensor | None = None, state: MambaState | None = None, **options: Any
    ) -> MambaOutput:
        """Read tokens after ``state``, or after the start state if that is None; see `MambaLM.forward`.

        Raises:
            ValueError: a row holds a second document, which would begin from nothing.
        """
        if state is None:
            state = self.start(len(input_ids))
        if seq_idx is not None and _second_document(seq_idx):
            raise ValueError("seq_idx: expected one document a row: a second one would not begin from the start state")
        output: MambaOutput = self.model(input_ids=input_ids, seq_idx=seq_idx, state=state, **options)
        return output


def _second_document(seq_idx: Tensor) -> bool:
    before, after = seq_idx[:, :-1], seq_idx[:, 1:]
    return bool(((before >= 0) & (after >= 0) & (before != after)).any())
