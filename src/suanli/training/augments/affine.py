"""Rotates, moves and scales each picture a little: for digits and other shapes that this doesn't change.

Edge pixels are continued outwards, so a plain background stays plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import WHOLE_PICTURE, check_number, uniform, warp


@dataclass(frozen=True, kw_only=True)
class Affine(Augmentation):
    """Largest rotation in degrees, move as a part of each side, and change of size as a part of 1."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE

    degrees: float = 10.0
    translate: float = 0.1
    scale: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "degrees", 0, 180)
        check_number(self, "translate", 0, 1)
        check_number(self, "scale", 0, 0.9)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        count, _, height, width = x.shape
        angle = uniform(batch, -self.degrees, self.degrees, generator) * (math.pi / 180)
        # This scales the sampling positions, so the picture scales by the inverse.
        zoom = 1 / (1 + uniform(batch, -self.scale, self.scale, generator))
        cosine, sine = angle.cos() * zoom, angle.sin() * zoom
        # Coordinates run from -1 to 1 along both sides, so a rotation must include the aspect ratio.
        matrices = torch.empty(count, 2, 3, device=x.device)
        matrices[:, 0, 0], matrices[:, 0, 1] = cosine, -sine * height / width
        matrices[:, 1, 0], matrices[:, 1, 1] = sine * width / height, cosine
        for axis in (0, 1):
            matrices[:, axis, 2] = 2 * uniform(batch, -self.translate, self.translate, generator)
        return batch.with_input("image", warp(x, matrices))


AUGMENT = Affine
