"""A random part of each picture, stretched to the full size: the standard augmentation of photos.

Source: C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6. Here, area
and aspect ratio are random, and the box is clipped to the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import WHOLE_PICTURE, check_range, uniform, warp


@dataclass(frozen=True, kw_only=True)
class ResizedCrop(Augmentation):
    """`scale` is the part's share of the area, `ratio` its width over its height, in units of the picture's."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE

    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_range(self, "scale", 0.01, 1)
        check_range(self, "ratio", 0.1, 10)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        count = len(x)
        area = uniform(batch, *self.scale, generator)
        log_ratio = uniform(batch, math.log(self.ratio[0]), math.log(self.ratio[1]), generator)
        # Sides in units of the picture's sides, so a part has the picture's aspect ratio times `ratio`.
        width = torch.sqrt(area * log_ratio.exp()).clamp(max=1)
        height = torch.sqrt(area / log_ratio.exp()).clamp(max=1)
        matrices = torch.zeros(count, 2, 3, device=x.device)
        matrices[:, 0, 0], matrices[:, 1, 1] = width, height
        matrices[:, 0, 2] = uniform(batch, -1, 1, generator) * (1 - width)
        matrices[:, 1, 2] = uniform(batch, -1, 1, generator) * (1 - height)
        return batch.with_input("image", warp(x, matrices))


AUGMENT = ResizedCrop
