"""State files: a `MambaState` on disk that knows the model, the tokenizer, the dtype and the tokens it came from.

The tensors are those of `MambaState.save`; the fingerprint stands in the safetensors header, so `MambaState.load` reads
the file too, without the checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mambacus.models.mamba import MambaLM
from mambacus.models.signature import mismatch, signature
from mambacus.models.state import MambaState
from mambacus.runtime.errors import UserError
from mambacus.runtime.outputs import fingerprint
from mambacus.runtime.records import write_bytes_atomic

FORMAT = "mambacus-state-1"  # of the tensors, see `MambaState.save`
_TENSORS = ("conv_state", "ssm_state", "tokens")
_KEY, _CHECKSUM = "fingerprint", "sha256"


@dataclasses.dataclass(frozen=True)
class StateFile:
    """What a state file holds.

    Attributes:
        state: of one row, on the CPU.
        token_ids: the tokens it has read, in order; for a tuned state those it was compiled from.
        prompt: how a question is put after it, as `mambacus.prompts` writes it, or None.
        notes: whatever else its maker wrote (``made_by``, figures of the tuning).
    """

    state: MambaState
    token_ids: tuple[int, ...]
    prompt: dict[str, Any] | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of all that decides how a tokenizer cuts a text; of a slow tokenizer, of its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint(sorted(tokenizer.get_vocab().items()))
    rules = json.loads(backend.to_str())
    for passing in ("truncation", "padding"):  # set by whoever calls it, no part of the rules
        rules.pop(passing, None)
    return fingerprint(rules)


def write_state(path: Path, file: StateFile, model: nn.Module, tokenizer: Any) -> None:
    """Write a state file, atomically.

    Args:
        path: the file.
        file: its content.
        model: that read the tokens, with its adapter if it has one.
        tokenizer: that made them.

    Raises:
        UserError: the file cannot be written.
    """
    import safetensors.torch

    base = _base(model)
    tensors = {name: getattr(file.state, name).detach().cpu().contiguous() for name in _TENSORS}
    about = {
        "model": base.name_or_path,
        "signature": signature(model),
        "dtype": _name(base),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "token_ids": list(file.token_ids),
        "prompt": file.prompt,
        "notes": file.notes,
    }
    text = json.dumps(about)
    metadata = {"format": FORMAT, _KEY: text, _CHECKSUM: _checksum(tensors, text)}
    write_bytes_atomic(path, safetensors.torch.save(tensors, metadata=metadata))


def read_state(path: str | os.PathLike[str], model: nn.Module, tokenizer: Any, *, flag: str = "--state") -> StateFile:
    """Read a state file for ``model`` to go on from.

    A file without a fingerprint (written by `MambaState.save`) is checked for its shapes alone.

    Args:
        path: the file.
        model: with its adapter, if the state was made with one.
        tokenizer: the model's.
        flag: where the user named the file.

    Raises:
        UserError: no such file, cut off or damaged, no state of one row, or one of another model, tokenizer or dtype.
    """
    state = MambaState.load(path)
    text, checksum = _header(path)
    base = _base(model)
    where = f"{flag} {path}"
    misfit = state.fits(base.config)
    if misfit or state.batch != 1:
        raise UserError(f"{where}: of another model: {misfit or f'{state.batch} rows, not 1'}")
    if text is None:
        return StateFile(state, ())
    if checksum != _checksum({name: getattr(state, name) for name in _TENSORS}, text):
        raise UserError(f"{where}: damaged: its content is not what was written")
    try:
        about = json.loads(text)
        if about["dtype"] != _name(base):
            raise UserError(f"{where}: made in {about['dtype']}, the model runs in {_name(base)}; choose --dtype alike")
        theirs, ours_now = (_quantised(names) for names in (about["signature"], dict(model.named_parameters())))
        if theirs != ours_now:
            kinds = ("plain", "quantised (--weights)")
            raise UserError(
                f"{where}: read with {kinds[theirs]} weights, the model's are {kinds[ours_now]}: a state belongs to "
                "the weights it was read with"
            )
        other = mismatch(about["signature"], model)
        if other:
            ours = base.name_or_path or "the given model"
            raise UserError(f"{where}: made with {about['model'] or 'a model'}, does not fit {ours}: {other}")
        extra = set(dict(model.named_parameters())) - set(about["signature"])
        if extra:
            raise UserError(f"{where}: made without {min(extra)}, which the model has (an adapter?)")
        if about["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise UserError(f"{where}: made with another tokenizer than the model's")
        return StateFile(state, tuple(about["token_ids"]), about["prompt"], about["notes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its fingerprint is not readable ({type(error).__name__}: {error})") from None


def _header(path: str | os.PathLike[str]) -> tuple[str | None, str | None]:
    """Return the fingerprint as text and the checksum; None and None of a file that holds tensors alone."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if set(metadata) <= {"format"}:
        return None, None
    return metadata.get(_KEY, ""), metadata.get(_CHECKSUM)


def _quantised(names: Iterable[str]) -> bool:
    """Whether parameters called so are of a model whose large matrices are quantised."""
    return any(name.endswith(".codes") for name in names)


def _base(model: nn.Module) -> MambaLM:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, MambaLM):
        raise TypeError(f"expected a MambaLM, got a {type(base).__name__}")
    return base


def _name(base: MambaLM) -> str:
    return str(base.dtype).removeprefix("torch.")


def _checksum(tensors: dict[str, Any], text: str) -> str:
    """Return a hash of the tensors and of the fingerprint."""
    import torch

    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass"))
    for name in _TENSORS:
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
