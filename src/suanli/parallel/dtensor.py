"""Sharded tensors (torch's DTensor), of which each process holds some rows.

The rows are divided as by `torch.chunk`, so the last processes may have none. An ordinary tensor counts as all local:
callers need no separate case for one process.

torch.distributed.tensor takes most of a second to import, so it is imported only where there are sharded tensors.
"""

from __future__ import annotations

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this process holds, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def local_rows(tensor: torch.Tensor) -> slice | None:
    """Which rows this process holds; None: the tensor isn't sharded."""
    if not is_sharded(tensor):
        return None
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    each = -(-len(tensor) // mesh.size())
    first = min(mesh.get_local_rank() * each, len(tensor))
    return slice(first, min(first + each, len(tensor)))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, in new memory; a collective for a sharded tensor, and an ordinary tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def from_local_part(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which this process holds `part`, sharded like `like`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
