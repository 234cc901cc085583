"""Enlarges or shrinks each image and moves it, with its boxes.

The factor is drawn evenly on a logarithmic scale, so that to shrink is as likely as to enlarge. Outside
of the image is the mean colour, since objects that touch an edge would otherwise be drawn out. A box of which little
stays in the image is no longer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._boxes import cut, move, rows_of, with_rows
from suanli.training.augments._sampling import WHOLE_PICTURE, check_number, uniform, warp


@dataclass(frozen=True, kw_only=True)
class Zoom(Augmentation):
    """`scale` 1.5 means a factor from 1/1.5 to 1.5; `move` is a part of each side. `least` is the share of a box that
    must stay."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = WHOLE_PICTURE | {"boxes"}

    scale: float = 1.4
    move: float = 0.1
    least: float = 0.3

    def __post_init__(self) -> None:
        check_number(self, "scale", 1, 10)
        check_number(self, "move", 0, 1)
        check_number(self, "least", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        height, width = x.shape[2:]
        factor = self.scale ** uniform(batch, -1, 1, generator)
        moves = torch.stack([uniform(batch, -self.move, self.move, generator) for _ in range(2)], 1)  # x, y
        # Sampling positions, from -1 to 1 along both sides: where a pixel of the result comes from.
        matrices = torch.zeros(len(x), 2, 3, device=x.device)
        matrices[:, 0, 0] = matrices[:, 1, 1] = 1 / factor
        matrices[:, :, 2] = -2 * moves / factor[:, None]
        zoomed = batch.with_input("image", warp(x, matrices, outside="zeros"))
        if (rows := rows_of(batch)) is None:
            return zoomed
        sides = torch.tensor([width, height], dtype=torch.float32, device=x.device)
        shift = sides * ((1 - factor[:, None]) / 2 + moves)
        moved = move(rows, factor[:, None].expand(-1, 2), shift)
        return with_rows(zoomed, cut(moved, torch.zeros_like(sides), sides, self.least))


AUGMENT = Zoom
