"""Tensors of which this process holds a piece: rows of a parameter that several processes share (torch's DTensor).

Each has a stretch of the first dimension, cut as `torch.chunk` does it, so the last ones may have none. An ordinary
tensor is its own piece: code that goes through here needs no case of its own for one process.

torch.distributed.tensor takes most of a second to load, so nothing here does unless there are such tensors.
"""

from __future__ import annotations

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds: the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def local_rows(tensor: torch.Tensor) -> slice | None:
    """The places in the first dimension that this process holds; None: the tensor is whole here."""
    if not is_sharded(tensor):
        return None
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    each = -(-len(tensor) // mesh.size())
    first = min(mesh.get_local_rank() * each, len(tensor))
    return slice(first, min(first + each, len(tensor)))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A collective for a shared tensor: all of it, in memory of its own."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def from_local_part(held: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The shared tensor of which this process holds `held`, as it holds its rows of `like`."""
    if not is_sharded(like):
        return held
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        held,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
