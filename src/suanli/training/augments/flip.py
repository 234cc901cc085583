"""Mirrors images left to right, and with `vertical` also top to bottom, with their boxes.

"alternate" mirrors a fixed half of the pictures in even epochs and the other half in odd ones, so that a picture looks
different in any two consecutive epochs: K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, section
3.6. A hash of a picture's position decides on the half, so it is the same after a resume and for any number of
processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from suanli.core.errors import UsageError, unknown
from suanli.core.types import Augmentation, Batch
from suanli.training.augments._boxes import move, rows_of, with_rows
from suanli.training.augments._sampling import WHOLE_PICTURE, per_image, uniform

Mode = Literal["random", "alternate"]


@dataclass(frozen=True, kw_only=True)
class Flip(Augmentation):
    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE | {"boxes"}

    mode: Mode = "random"
    vertical: bool = False  # for images that have no top, such as those of a microscope

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise unknown("mode of augmentation flip", str(self.mode), get_args(Mode))
        if not isinstance(self.vertical, bool):
            raise UsageError(f"Augmentation flip: vertical is {self.vertical!r}.", fix="Give True or False.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        if self.mode == "alternate":
            mask = (_hash_bit(batch.index) + batch.epoch) % 2 == 1
        else:
            mask = uniform(batch, 0, 1, generator) < 0.5
        batch = _mirror(batch, mask, axis=0)
        return _mirror(batch, uniform(batch, 0, 1, generator) < 0.5, axis=1) if self.vertical else batch

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [inputs, inputs.flip(-1)]


def _mirror(batch: Batch, mask: torch.Tensor, axis: int) -> Batch:
    """The images where `mask` (B,) is true, along x (axis 0) or y (1)."""
    x = batch.inputs["image"]
    mirrored = batch.with_input("image", torch.where(per_image(mask, x), x.flip(3 - axis), x))
    if (rows := rows_of(batch)) is None:
        return mirrored
    factor = torch.ones(len(mask), 2, device=x.device)
    factor[:, axis] = torch.where(mask, -1.0, 1.0)
    shift = torch.zeros_like(factor)
    shift[:, axis] = torch.where(mask, float(x.shape[3 - axis]), 0.0)
    return with_rows(mirrored, move(rows, factor, shift))


def _hash_bit(index: torch.Tensor) -> torch.Tensor:
    """One well-mixed bit of each position below 2**31: two multiply-and-shift rounds on 32 bits."""
    bits = index
    for factor in (0x45D9F3B, 0x2C1B3C6D):
        bits = ((bits ^ (bits >> 16)) * factor) & 0xFFFFFFFF
    return (bits >> 16) & 1


AUGMENT = Flip
