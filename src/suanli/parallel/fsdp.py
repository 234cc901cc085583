"""Sharding: weights, gradients and optimizer state are divided over the processes that train a network.

Each process holds an equal part of every parameter. The weights of a block are gathered while it is computed, forward
and backward, and freed afterwards; its gradients are summed directly into the parts. So a process needs memory for its
part of the network and for two whole blocks, and in exchange sends the weights twice a step.

The engine is torch's `fully_shard`. Source: S. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models", SC 2020; Y. Zhao et al., "PyTorch FSDP", VLDB 2023.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from suanli.core.errors import UsageError, first_line
from suanli.machine.device import is_out_of_memory
from suanli.parallel import dtensor
from suanli.parallel.blocks import repeated_blocks
from suanli.parallel.group import Group

GATHERED_BLOCKS = 4  # at most at once: a block, the one before it, its gradients, and those while they are reduced
GATHERED_REST = 3  # copies of what is in no block: it is needed from the first layer to the last


def shard(module: nn.Module, group: Group, device: torch.device) -> None:
    """A collective: afterwards each process holds its part of `module`, on `device`, with the values of the first
    process. The others may pass a module on the meta device (`build.build_on_meta`), which gets memory block by block.
    The module stays the same object, but torch changes its class to one derived from it.

    Raises UsageError for a network that can't be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _fill(module, module.named_buffers)
    torch.zeros((), device=device)  # a mesh chooses a device by itself unless one is in use
    mesh = init_device_mesh(device.type, (group.size,))
    for unit in (*separable_blocks(module), module):
        _fill(unit, unit.named_parameters)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                # The root is freed after the forward pass, too: it may be most of the network.
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"This network can't be sharded: {first_line(error, 200)}", fix="Train without --shard."
            ) from error


def _fill(module: nn.Module, named_tensors: Callable[..., Iterable[tuple[str, Tensor]]]) -> None:
    """A collective: those tensors of `module` that aren't sharded yet get the values of the first process, and memory
    where they are on the meta device."""
    real: dict[int, Tensor] = {}  # by the id of the meta tensor, which may have several names
    for path, tensor in list(named_tensors(remove_duplicate=False)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in real:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            real[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, real[id(tensor)])
    for _, tensor in named_tensors():
        if not dtensor.is_sharded(tensor):
            tensor.data = tensor.data.contiguous()
            dist.broadcast(tensor.detach(), 0)


def separable_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that can be gathered separately: none of their weights is used outside."""
    separate = []
    for block in repeated_blocks(module):
        own = {id(p) for p in block.parameters()}
        inside = {id(m) for m in block.modules()}
        others = (p for m in module.modules() if id(m) not in inside for p in m.parameters(recurse=False))
        if own and not any(id(p) in own for p in others):
            separate.append(block)
    return separate


def local_bytes(module: nn.Module) -> int:
    """Bytes of the weights and buffers that this process holds all the time."""
    return sum(_bytes(dtensor.local_part(t)) for t in module.state_dict().values())


def gathered_bytes(module: nn.Module) -> int:
    """Bytes that gathered weights and gradients take at most, in addition to `local_bytes`; 0 for a network that isn't
    sharded."""
    if not any(dtensor.is_sharded(p) for p in module.parameters()):
        return 0
    units = separable_blocks(module)
    sizes = [sum(map(_bytes, unit.parameters())) for unit in units]
    inside = {id(p) for unit in units for p in unit.parameters()}
    rest = sum(_bytes(p) for p in module.parameters() if id(p) not in inside)
    return GATHERED_BLOCKS * max(sizes, default=0) + GATHERED_REST * rest


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
