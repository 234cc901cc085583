"""An automatic policy with nothing to tune: one random operation of random strength for each picture.

Source: S. Müller, F. Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation",
ICCV 2021, with these differences: it works on normalised inputs, so brightness adds instead of
scaling towards black; solarize and posterize take the picture's own darkest and brightest values as
the range; equalize and autocontrast are left out; strengths are continuous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import (
    WHOLE_PICTURE,
    change_where,
    check_number,
    integers,
    per_image,
    to_grey,
    uniform,
    warp,
)

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Auto(Augmentation):
    """`strength` scales how far the operations may go; 1 is the paper's narrower space."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "strength", 0, 2)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        pixelwise = PIXELWISE if x.shape[1] == 3 else PIXELWISE[1:]  # grey has no saturation
        kinds = 1 + len(GEOMETRIC) + len(pixelwise)  # the 1 leaves the picture as it is
        kind = integers(batch, kinds, generator)
        amount = uniform(batch, -self.strength, self.strength, generator)
        changed = change_where(kind < len(GEOMETRIC), x.clone(), _move, kind, amount)
        for number, change in enumerate(pixelwise, start=len(GEOMETRIC)):
            changed = change_where(kind == number, changed, change, amount)
        return batch.with_input("image", changed)


# Largest change of the sampling matrix, whose coordinates run from -1 to 1: element and amount.
GEOMETRIC = (
    (((0, 1), 0.3),),  # shear along x
    (((1, 0), 0.3),),  # shear along y
    (((0, 2), 0.5),),  # move along x
    (((1, 2), 0.5),),  # move along y
    (((0, 1), -0.5), ((1, 0), 0.5)),  # rotation: about 27 degrees, see _move
)


def _move(x: torch.Tensor, kind: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    matrices = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    for number, entries in enumerate(GEOMETRIC):
        for (row, column), most in entries:
            matrices[:, row, column] += torch.where(kind == number, amount * most, 0.0)
    # Divided by the root of the determinant, two opposite shears are a rotation; that of a single shear is 1.
    linear = matrices[:, :, :2]
    scale = torch.sqrt(linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0])
    matrices[:, :, :2] = linear / scale[:, None, None]
    aspect = x.shape[2] / x.shape[3]
    matrices[:, 0, 1] *= aspect
    matrices[:, 1, 0] /= aspect
    return warp(x, matrices)


def _saturation(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, to_grey(x), per_image(-0.9 * amount, x))


def _brightness(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return x + per_image(amount, x)


def _contrast(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, x.mean((1, 2, 3), keepdim=True), per_image(-0.9 * amount, x))


def _sharpness(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    # On planes: pooling over three interleaved channels was measured several times as slow.
    padded = F.pad(x.contiguous(), (1, 1, 1, 1), mode="replicate")
    return torch.lerp(x, F.avg_pool2d(padded, 3, stride=1), per_image(-0.9 * amount, x))


def _solarize(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Inverts what is brighter than a level within the picture's range."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    level = torch.lerp(high, low, per_image(amount.abs().clamp(max=1), x))
    return torch.where(x > level, low + high - x, x)


def _posterize(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Rounds to 64 levels down to 4 within the picture's range."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    steps = per_image(torch.exp2(6 - 4 * amount.abs().clamp(max=1)).round() - 1, x)
    unit = (high - low).clamp(min=1e-6) / steps
    return low + ((x - low) / unit).round() * unit


PIXELWISE: tuple[Operation, ...] = (
    _saturation,  # first, so that it is easy to leave out for grey pictures
    _brightness,
    _contrast,
    _sharpness,
    _solarize,
    _posterize,
)

AUGMENT = Auto
