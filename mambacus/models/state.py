"""The state of a Mamba model: all it remembers of what it has read, as one value that can be forked and stored."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambacus.models.config import MambaConfig
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import write_bytes_atomic

_FORMAT = "mambacus-state-1"
_NAMES = ("conv_state", "ssm_state", "tokens")


@dataclasses.dataclass(frozen=True)
class MambaState:
    """What a model remembers of each row of a batch after some tokens.

    Its tensors are never changed in place, except by a model that is told ``reuse_state=True``.

    Attributes:
        conv_state: the last ``d_conv`` inputs of every convolution, oldest first, zeros before the document's start,
            (n_layer, batch, d_inner, d_conv).
        ssm_state: state of every scan, float32, (n_layer, batch, d_inner, d_state).
        tokens: number of tokens of the current document that were read, int64 (batch,).
    """

    conv_state: Tensor
    ssm_state: Tensor
    tokens: Tensor

    @classmethod
    def zeros(
        cls,
        config: MambaConfig,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> MambaState:
        """Return the state before any token; ``dtype`` is that of the convolution's inputs."""
        rows = (config.n_layer, batch, config.d_inner)
        return cls(
            conv_state=torch.zeros(*rows, config.d_conv, device=device, dtype=dtype),
            ssm_state=torch.zeros(*rows, config.d_state, device=device),
            tokens=torch.zeros(batch, device=device, dtype=torch.int64),
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.conv_state.nbytes + self.ssm_state.nbytes + self.tokens.nbytes

    def fork(self, n: int) -> MambaState:
        """Return a state with every row repeated ``n`` times, copies of a row side by side."""
        if n < 1:
            raise ValueError(f"n: expected >= 1, got {n}")
        return self.select(torch.arange(self.batch, device=self.tokens.device).repeat_interleave(n))

    def select(self, rows: Tensor | Sequence[int]) -> MambaState:
        """Return the given rows in the given order; a row may be taken several times or never.

        Args:
            rows: row numbers, int64 (n,), or booleans (batch,) that are True for the rows to keep.
        """
        index = torch.as_tensor(rows, device=self.tokens.device)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.to(torch.int64)
        return MambaState(
            self.conv_state.index_select(1, index),
            self.ssm_state.index_select(1, index),
            self.tokens.index_select(0, index),
        )

    def narrow(self, first: int, rows: int) -> MambaState:
        """Return ``rows`` rows from ``first`` on, in the same memory."""
        part = slice(first, first + rows)
        return MambaState(self.conv_state[:, part], self.ssm_state[:, part], self.tokens[part])

    @staticmethod
    def cat(states: Sequence[MambaState]) -> MambaState:
        """Return one state with the rows of all ``states``, in order."""
        if not states:
            raise ValueError("states: expected at least one, got none")
        return MambaState(
            torch.cat([state.conv_state for state in states], dim=1),
            torch.cat([state.ssm_state for state in states], dim=1),
            torch.cat([state.tokens for state in states]),
        )

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Return the state on ``device``, with ``conv_state`` in ``dtype``; ``ssm_state`` stays float32.

        Either may come first, as in torch: ``state.to("cuda")``, ``state.to(torch.bfloat16)``.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return MambaState(
            self.conv_state.to(device=device, dtype=dtype), self.ssm_state.to(device), self.tokens.to(device)
        )

    def detach(self) -> MambaState:
        """Return the state cut from the graph of gradients."""
        return MambaState(self.conv_state.detach(), self.ssm_state.detach(), self.tokens)

    def fits(self, config: MambaConfig) -> str | None:
        """Return None if a model of this ``config`` can go on from the state, else one clause that says why not."""
        for name, width in (("conv_state", config.d_conv), ("ssm_state", config.d_state)):
            expected = (config.n_layer, self.batch, config.d_inner, width)
            got = tuple(getattr(self, name).shape)
            if got != expected:
                return f"{name}: expected shape {expected}, got {got}"
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        import safetensors.torch

        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _NAMES}
        write_bytes_atomic(Path(path), safetensors.torch.save(tensors, metadata={"format": _FORMAT}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MambaState:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, corrupt, or no state of ours.
        """
        import safetensors

        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                if (file.metadata() or {}).get("format") != _FORMAT or set(file.keys()) != set(_NAMES):
                    raise UserError(f"{path}: expected a state written by mambacus ({_FORMAT}), got another file")
                return cls(*(file.get_tensor(name) for name in _NAMES))
        except OSError as error:
            raise UserError(f"cannot read the state {path}: {error.strerror or error}") from None
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
