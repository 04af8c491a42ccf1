"""A run of kernels and torch operations over memory that stays where it is, recorded to be run again.

What CUDA graphs are to a GPU: between two of the two hundred kernels that decode one token, Python takes as long as a
kernel. A tape keeps their arguments and calls them in one go, on threads that are started once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambacus.ops.threads import Call, recording, run_calls

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype, torch.ops.aten.clone.default}
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class RecordingError(Exception):
    """The run does something that a tape cannot repeat."""


class Tape:
    """The kernels and operations of one run, in order, and the memory that they use.

    Repeating is right while nothing but the content of that memory changes: no tensor may have moved, and a value that
    Python computed once is not computed again.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._calls: list[Call] = []  # of kernels, since the last operation
        self._kept: list[Any] = []

    @classmethod
    def record(cls, run: Callable[[], Any]) -> tuple[Tape, Any]:
        """Run ``run`` once on CPU tensors; return the tape and what ``run`` returned.

        Raises:
            RecordingError: it reads a number out of a tensor, or makes a tensor whose shape depends on numbers.
        """
        tape = cls()
        with recording(tape._calls), _Operations(tape):
            result = run()
        tape._close()
        tape._kept.append(result)
        return tape, result

    def __len__(self) -> int:
        """Return the number of steps: stretches of kernels, and operations between them."""
        return len(self._steps)

    def replay(self) -> None:
        """Run again what was recorded."""
        for step in self._steps:
            step()

    def add(self, operation: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Append a torch operation, unless it only allocates memory or looks at it in another way."""
        if _depends_on_numbers(operation, args):
            raise RecordingError(f"{operation}: its result depends on numbers in a tensor")
        self._kept += [args, kwargs, out]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if operation in _ALLOCATIONS or not (operation._schema.is_mutable or _new_memory(results, (args, kwargs))):
            return
        self._close()
        if operation._schema.is_mutable:
            self._steps.append(functools.partial(operation, *args, **kwargs))
        elif operation in _COPIES:
            self._steps.append(functools.partial(results[0].copy_, args[0]))
        else:
            self._steps.append(functools.partial(_again, operation, args, kwargs, results))

    def _close(self) -> None:
        """Make one step of the kernels since the last operation."""
        if self._calls:
            self._steps.append(run_calls(self._calls))
            self._kept.append(list(self._calls))
            self._calls.clear()


class _Operations(TorchDispatchMode):
    """Hands every torch operation to a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping `__torch_dispatch__` in a call that imports its compiler, for 1.7 s."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._tape.add(func, args, kwargs or {}, out)
        return out


def _depends_on_numbers(operation: Any, args: Any) -> bool:
    """Tell whether a result is no tensor, or of a shape, that other numbers in the inputs would change."""
    masks = operation is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
    return masks or not _DATA_DEPENDENT.isdisjoint(operation.tags)


def _again(operation: Any, args: Any, kwargs: dict[str, Any], results: list[Tensor]) -> None:
    out = operation(*args, **kwargs)
    for target, source in zip(results, tree_leaves(out), strict=True):
        target.copy_(source)


def _new_memory(results: list[Tensor], inputs: Any) -> bool:
    """Tell whether a result lies in other memory than the inputs."""
    known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    return any(result.untyped_storage().data_ptr() not in known for result in results)
