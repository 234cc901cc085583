"""A network whose weights, gradients and optimizer state are shared out over the processes that train it.

Each holds an equal part of every parameter. A block of the network is gathered when it is computed, forward and
backward, and let go afterwards; its gradients are summed straight into the parts. So a process needs memory for its
part of the network and for two blocks of it, in exchange for sending the weights around twice a step.

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

GATHERED_BLOCKS = 4  # at once at most: a block, the one before it, its gradients, and these on their way to the parts
GATHERED_REST = 3  # of what is in no block: it is needed from the first layer to the last


def shard(module: nn.Module, group: Group, device: torch.device) -> None:
    """A collective: from here on each process holds its part of `module`, on `device`, with the values of the first
    process, which alone need have any: for the others an outline does (`building.outline`), and gets memory one
    block after the other. Another module than the one that was built only in its class, which torch derives from its
    own.

    Raises UsageError for a network that can't be shared out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _fill(module, module.named_buffers)
    torch.zeros((), device=device)  # a mesh takes a device of its own choice unless one is in use
    mesh = init_device_mesh(device.type, (group.size,))
    for unit in (*separable_blocks(module), module):
        _fill(unit, unit.named_parameters)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                # The rest, too, is let go after the forward pass: it may be most of a network.
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"This network can't be shared out: {first_line(error, 200)}", fix="Train without --shard."
            ) from error


def _fill(module: nn.Module, named: Callable[..., Iterable[tuple[str, Tensor]]]) -> None:
    """A collective: those tensors of `module` that aren't shared out yet get the values of the first process, and
    memory where they are outlined."""
    made: dict[int, Tensor] = {}  # one may have several places
    for path, tensor in list(named(remove_duplicate=False)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in made:
            real = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real
        place, _, name = path.rpartition(".")
        setattr(module.get_submodule(place), name, made[id(tensor)])
    for _, tensor in named():
        if not dtensor.is_sharded(tensor):
            tensor.data = tensor.data.contiguous()
            dist.broadcast(tensor.detach(), 0)


def separable_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that can be gathered by themselves: none of their weights is used outside."""
    found = []
    for block in repeated_blocks(module):
        own = {id(p) for p in block.parameters()}
        inside = {id(m) for m in block.modules()}
        others = (p for m in module.modules() if id(m) not in inside for p in m.parameters(recurse=False))
        if own and not any(id(p) in own for p in others):
            found.append(block)
    return found


def local_bytes(module: nn.Module) -> int:
    """Of weights and buffers that lie in this process all the time."""
    return sum(_bytes(dtensor.local_part(t)) for t in module.state_dict().values())


def gathered_bytes(module: nn.Module) -> int:
    """The most that the weights and gradients of whole parts of the network take, beside what is held; 0 for a
    network that isn't shared out."""
    if not any(dtensor.is_sharded(p) for p in module.parameters()):
        return 0
    units = separable_blocks(module)
    sizes = [sum(map(_bytes, unit.parameters())) for unit in units]
    inside = {id(p) for unit in units for p in unit.parameters()}
    rest = sum(_bytes(p) for p in module.parameters() if id(p) not in inside)
    return GATHERED_BLOCKS * max(sizes, default=0) + GATHERED_REST * rest


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
