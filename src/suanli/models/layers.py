"""The order of a network's layers, from the names and the order of its parameters.

A layer is a block of a stage (`layer1.0`, `blocks.3.1`, `stages.2.blocks.0`, `features.4`), or outside of blocks a
module with matrices or filters. Norms and biases that stand alone belong to the layer before them. Embeddings, and
parameters of the network itself, are the first layer, as in Bao et al., "BEiT", arXiv:2106.08254. Names that tell
nothing are taken in the order in which the network lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import nn

# A part of a name that counts blocks or stages: "3", "layer1", "denseblock2", "encoder_layer_7", "block1-0", "s1".
_COUNTED = re.compile(r"(?:[\w-]*(?:block|layer|stage|level|unit|group|cell)s?[_-]?|[bs])?\d+(?:-\d+)?", re.IGNORECASE)
_LISTS = ("blocks", "layers", "stages", "groups", "units", "cells")  # within a stage
_FIRST = ""  # the layer of the embeddings

Head: TypeAlias = str | tuple[str, ...]  # the submodules that start from nothing where the others start from weights


def in_head(name: str, head: Head) -> bool:
    """Whether a parameter belongs to the submodule `head`, or to one of them."""
    return name.startswith(tuple(f"{one}." for one in ((head,) if isinstance(head, str) else head)))


def is_embedding(name: str) -> bool:
    """Whether it is a table that is looked up or added, by the names that those have in practice."""
    return any(word in name for word in ("embed", "_token"))


def head_distances(named: Iterable[tuple[str, torch.Tensor]], head: Head) -> dict[str, int]:
    """How many layers each parameter's layer is away from the head, by name. The head's own is 0, and that of the
    layer before it 1. All parameters of the network must be given, in its own order."""
    named = list(named)
    keys = {name: _layer_key(name) for name, _ in named if not in_head(name, head)}
    has_matrix = {_FIRST: False, **dict.fromkeys(keys.values(), False)}
    for name, parameter in named:
        if name in keys and parameter.ndim > 1:
            has_matrix[keys[name]] = True
    places, place, filled = {}, 0, False
    for key, matrix in has_matrix.items():
        if matrix and filled:
            place += 1
        places[key], filled = place, filled or matrix
    count = place + 1
    return {name: count - places[keys[name]] if name in keys else 0 for name, _ in named}


def module_distances(model: nn.Module, head: Head) -> Iterator[tuple[nn.Module, int]]:
    """Each module with the distance of its own parameters from the head. One without any counts to the layer before
    it."""
    distances = head_distances(model.named_parameters(), head)
    last = max(distances.values(), default=0)
    for path, module in model.named_modules():
        own = (f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))
        last = next((distances[name] for name in own if name in distances), last)
        yield module, last


def _layer_key(name: str) -> str:
    """The block that a parameter is in, or else the module that it belongs to."""
    owner, parametrized, _ = name.partition(".parametrizations.")
    path = (owner if parametrized else name.rpartition(".")[0]).split(".")
    first = next((i for i, part in enumerate(path) if _COUNTED.fullmatch(part)), None)
    if first is None:
        return _FIRST if is_embedding(name) else ".".join(path)
    end = first + 1
    while end < len(path):
        if _COUNTED.fullmatch(path[end]):
            end += 1
        elif path[end].lower() in _LISTS and end + 1 < len(path) and _COUNTED.fullmatch(path[end + 1]):
            end += 2
        else:
            break
    return ".".join(path[:end])
