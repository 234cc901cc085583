"""Covers one random square of each picture with the mean colour.

Source: T. DeVries, G. Taylor, "Improved Regularization of Convolutional Neural Networks with
Cutout", 2017. The centre may lie at the edge, so part of the square may fall outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from suanli.augments._sampling import check_number
from suanli.types import Augmentation, Batch


@dataclass(frozen=True, kw_only=True)
class Cutout(Augmentation):
    """`size` is the square's side as a part of the picture's shorter side."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    size: float = 0.25

    def __post_init__(self) -> None:
        check_number(self, "size", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs
        count, _, height, width = x.shape
        side = round(self.size * min(height, width))
        rows, columns = (_covered(count, length, side, x.device, generator) for length in (height, width))
        covered = rows[:, None, :, None] & columns[:, None, None, :]
        return replace(batch, inputs=torch.where(covered, 0.0, x))


def _covered(count: int, length: int, side: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """(count, length) bool: which pixels of a line lie in a stretch of `side` with a random centre."""
    first = torch.randint(length, (count, 1), generator=generator, device=device) - side // 2
    at = torch.arange(length, device=device)
    return (at >= first) & (at < first + side)


AUGMENT = Cutout
