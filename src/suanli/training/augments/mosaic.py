"""Puts parts of four images of the batch together, with their boxes: objects are seen among others than their own.

Each part has the image's own scale; `zoom` after it changes that. Source: Bochkovskiy et al., "YOLOv4",
arXiv:2004.10934.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.errors import DataError
from suanli.core.types import Augmentation, Batch
from suanli.training.augments._boxes import cut, move, rows_of, with_rows
from suanli.training.augments._sampling import check_number, group_of, uniform

MIDDLE = 0.3  # the parts meet no nearer to a border than this share of the side


@dataclass(frozen=True, kw_only=True)
class Mosaic(Augmentation):
    """An image becomes a mosaic with `probability`. `least` is the share of a box that must stay."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = frozenset({"boxes"})
    neighbours: ClassVar[int] = 4

    probability: float = 0.5
    least: float = 0.3

    def __post_init__(self) -> None:
        check_number(self, "probability", 0, 1)
        check_number(self, "least", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Raises DataError for a batch without boxes."""
        x, rows = batch.inputs["image"], rows_of(batch)
        if rows is None:
            raise DataError("mosaic needs images with boxes.", fix="Leave it out of augment.")
        size = torch.tensor([x.shape[3], x.shape[2]], device=x.device)  # width and height
        chosen = uniform(batch, 0, 1, generator) < self.probability
        meet = torch.stack([uniform(batch, MIDDLE, 1 - MIDDLE, generator) for _ in range(2)], 1)
        meet = (meet * size).long()  # (B, 2): where the parts meet
        meet = torch.where(chosen[:, None], meet, size)  # else the first part, the image itself, fills everything
        sources = group_of(batch, self.neighbours)  # (B, 4)
        across, down = (torch.arange(int(side), device=x.device) for side in (x.shape[3], x.shape[2]))
        is_right, is_below = across >= meet[:, :1], down >= meet[:, 1:]  # (B, W), (B, H)
        pixel_of = torch.zeros_like(x[:, 0], dtype=torch.long)  # (B, H, W): which of all pixels of the batch
        parts = []
        for part, side in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):  # right of where they meet, and below
            far = torch.tensor(side, dtype=torch.bool, device=x.device)
            low, high = torch.where(far, meet, 0), torch.where(far, size, meet)
            room = size - (high - low)
            start = torch.stack([uniform(batch, 0, 1, generator) for _ in range(2)], 1) * (room + 1)
            shift = low - torch.minimum(start.long(), room)  # from the source's coordinates to those of the mosaic
            moved = move(rows[sources[:, part]], torch.ones_like(shift, dtype=torch.float32), shift.float())
            parts.append(cut(moved, low.float(), high.float(), self.least))
            here = (is_right == far[0])[:, None, :] & (is_below == far[1])[:, :, None]
            column, line = across - shift[:, :1], down - shift[:, 1:]
            place = (sources[:, part, None, None] * len(down) + line[:, :, None]) * len(across) + column[:, None]
            pixel_of = torch.where(here, place, pixel_of)
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
        mixed = pixels[pixel_of.flatten()].view(*pixel_of.shape, x.shape[1]).permute(0, 3, 1, 2)
        return with_rows(batch.with_input("image", mixed), torch.cat(parts, 1))


AUGMENT = Mosaic
