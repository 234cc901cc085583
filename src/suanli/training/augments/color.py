"""Changes brightness, contrast and (with three channels) saturation of each picture.

On normalised inputs, brightness adds to all channels, in standard deviations of the data set; contrast scales the
distance from the picture's own mean; saturation scales the distance of each pixel from its grey, the mean of its
channels. A setting of 0.2 means a factor from 0.8 to 1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import EVERY_ROLE, check_number, per_image, to_grey, uniform


@dataclass(frozen=True, kw_only=True)
class Color(Augmentation):
    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = EVERY_ROLE

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check_number(self, name, 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        spans = (self.brightness, self.contrast, self.saturation)
        shift, contrast, saturation = (per_image(uniform(batch, -span, span, generator), x) for span in spans)
        mean = x.mean((1, 2, 3), keepdim=True)
        offset = shift - contrast * mean
        # Contrast and saturation both leave a picture's mean as it is, so they are one operation: a factor of x, plus
        # an offset that depends on the picture and on the grey of the pixel.
        if self.saturation and x.shape[1] == 3:
            offset = offset - (1 + contrast) * saturation * to_grey(x)
            contrast = contrast + saturation + contrast * saturation
        return batch.with_input("image", torch.addcmul(offset, x, 1 + contrast))


AUGMENT = Color
