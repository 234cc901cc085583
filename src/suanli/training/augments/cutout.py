"""Covers one random square of each picture with the mean colour.

Source: T. DeVries, G. Taylor, "Improved Regularization of Convolutional Neural Networks with
Cutout", 2017. The centre may lie at the edge, so the square may reach beyond the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import WHOLE_PICTURE, check_number, integers


@dataclass(frozen=True, kw_only=True)
class Cutout(Augmentation):
    """`size` is the side of the square, as a part of the picture's shorter side."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE

    size: float = 0.25

    def __post_init__(self) -> None:
        check_number(self, "size", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        height, width = x.shape[2:]
        side = round(self.size * min(height, width))
        rows, columns = (_interval(batch, length, side, generator) for length in (height, width))
        covered = rows[:, None, :, None] & columns[:, None, None, :]
        return batch.with_input("image", torch.where(covered, 0.0, x))


def _interval(batch: Batch, length: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """(B, length) bool: the pixels in an interval of `side` pixels with a random centre."""
    first = integers(batch, length, generator)[:, None] - side // 2
    pixels = torch.arange(length, device=first.device)
    return (pixels >= first) & (pixels < first + side)


AUGMENT = Cutout
