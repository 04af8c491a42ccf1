"""The model shared out over the processes (FSDP2): each holds a part of every tensor and gathers a block to run it.

Sharding is torch's ``fully_shard`` as accelerate's FSDP plugin applies it, with one unit for each `Block` and one for
the rest (embedding, final norm and head, so tied matrices stay one). Parameters, gathered copies, gradients and their
sums are float32, since A_log, D and the step's bias must be; autocast makes the matrix products in bfloat16 as ever.
Where a tensor is shared out, functions that give or take a whole one are called by all processes in the same order;
plain tensors stay as they are.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambacus.models.mamba import Block, MambaLM, MambaMixer
from mambacus.models.ssm_adapters import Affix
from mambacus.tuning import processes

if TYPE_CHECKING:
    from accelerate import Accelerator


def use_plugin(accelerator: Accelerator, model: nn.Module) -> None:
    """Make accelerate shard with our units, float32 throughout, from weights that every process has loaded itself."""
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate reads the plugin for accelerators only
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        state.distributed_type = DistributedType.FSDP
    # the backbone writes into nothing that a block returns
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    plugin = state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [unit.__name__ for unit in _units(model)]
    plugin.mixed_precision_policy = None
    plugin.cpu_ram_efficient_loading = False  # it would shard what must stay whole: the buffers of adapters


def _units(model: nn.Module) -> list[type[nn.Module]]:
    """Return the classes of modules whose tensors are gathered together; with none, those of the model are."""
    if any(isinstance(module, Affix) for module in model.modules()):
        return [MambaMixer]  # an affix is read by the mixers outside of their blocks
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    owned = sum(len(list(block.parameters())) for block in blocks)
    apart = {parameter for block in blocks for parameter in block.parameters()}
    return [Block] if len(apart) == owned else []  # some adapters use one tensor in all blocks


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every process."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; it may be empty."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor, whole on every process, as ``other`` is held: whole on its device, or this process's part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def gathered(state: Any) -> Any:
    """Return nested dicts, lists and tuples with what was shared out whole, on the CPU of the first process.

    One tensor is whole at a time; on the other processes None stands in its place.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        tensor = whole(state.detach())
        return tensor.cpu() if processes.is_main() else None
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value) for value in state)
    return state


def gathered_result(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of ``model.state_dict()`` that are not frozen parameters, as `gathered` does."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    found: dict[str, Tensor] = gathered({name: t for name, t in model.state_dict().items() if name not in frozen})
    return found


def plain_twin(model: MambaLM, tensors: dict[str, Tensor]) -> MambaLM:
    """Return a model like ``model`` of whole ``tensors``."""
    with torch.device("meta"):
        twin = MambaLM(model.config)
    twin.load_state_dict(tensors, assign=True)
    twin.tie_weights()
    return twin


def anywhere(flags: Tensor) -> Tensor:
    """Return for each of ``flags`` (n,) whether it is set on any process."""
    counts = flags.to(torch.int32)
    torch.distributed.all_reduce(counts)
    return counts > 0


def is_shared_out(model: nn.Module) -> bool:
    """Return whether every parameter of ``model`` is shared out."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(parameter, DTensor) for parameter in model.parameters())
