"""Moves each picture by a few random pixels; the edges are filled with a mirror image.

The standard augmentation of small images (pad, then crop to the original size). All crops of a batch are one indexed
read of a padded copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import WHOLE_PICTURE, check_number, integers


@dataclass(frozen=True, kw_only=True)
class Crop(Augmentation):
    """`padding` in pixels; where it is None, `fraction` of each side."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE

    padding: int | None = None
    fraction: float = 0.125

    def __post_init__(self) -> None:
        if self.padding is not None:
            check_number(self, "padding", 0, 1024)
            object.__setattr__(self, "padding", int(self.padding))
        check_number(self, "fraction", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        count, _, height, width = x.shape
        down, right = self._distance(height), self._distance(width)
        windows = _windows(_pad(x, down, right), height, width)
        dy = integers(batch, 2 * down + 1, generator)
        dx = integers(batch, 2 * right + 1, generator)
        moved = windows[torch.arange(count, device=x.device), dy, dx]
        return batch.with_input("image", moved.permute(0, 3, 1, 2))

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """The inputs as they are, and moved by one pixel towards two opposite corners."""
        height, width = inputs.shape[2:]
        if not (self._distance(height) and self._distance(width)):
            return [inputs]
        windows = _windows(_pad(inputs, 1, 1), height, width)
        return [inputs, *(windows[:, move, move].permute(0, 3, 1, 2) for move in (0, 2))]

    def _distance(self, side: int) -> int:
        """The largest move in pixels. Reflection padding must be smaller than the side."""
        pixels = round(side * self.fraction) if self.padding is None else self.padding
        return min(pixels, side - 1)


def _pad(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    return F.pad(x, (right, right, down, down), mode="reflect") if down or right else x


def _windows(padded: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H + 2 dy, W + 2 dx) to a view (B, 2 dy + 1, 2 dx + 1, H, W, C) of all its crops."""
    return padded.permute(0, 2, 3, 1).unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)


AUGMENT = Crop
