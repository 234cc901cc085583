"""How a network recognises the files of published originals: renaming, and the comparison with the network itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from suanli.core.types import Json, Shapes

EXAMPLE: Mapping[str, Any] = {"classes": 2, "in_channels": 3, "image_size": (224, 224)}


def rename(
    tensors: Mapping[str, torch.Tensor], rules: Sequence[tuple[str, str]], *, drop: str = ""
) -> dict[str, torch.Tensor]:
    """Replace in each name, one rule (a regular expression and what takes its place) after the other. What then
    begins with the regular expression `drop` is left out."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        if not (drop and re.match(drop, name)):
            renamed[name] = tensor
    return renamed


def outline(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def confirm(
    args: dict[str, Json], build: Callable[..., nn.Module], tensors: Mapping[str, torch.Tensor], head: str
) -> dict[str, Json] | None:
    """`args` where the network that `build` makes of them has just these tensors; else None. The head, the number of
    input channels and the number of positions may be others."""
    with torch.device("meta"):
        state = build(**EXAMPLE, **args).state_dict()
    first = first_convolution(state)
    for name, expected in state.items():
        if name.startswith(f"{head}.") or name.endswith(".num_batches_tracked"):
            continue
        if name not in tensors:
            return None
        given, wanted = list(tensors[name].shape), list(expected.shape)
        if (name == first or name == "pos_embed") and len(given) == len(wanted):
            given[1] = wanted[1]
        if given != wanted:
            return None
    return args if tensors.keys() <= state.keys() else None


def first_convolution(state: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the filters that see the image: those of the first two-dimensional convolution."""
    return next((name for name, tensor in state.items() if tensor.ndim == 4), None)
