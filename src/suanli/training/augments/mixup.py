"""Blends each picture with another of the batch; its target becomes shares of both classes, or the boxes of both.

Sources: H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; for boxes Z. Zhang et al., "Bag of
Freebies for Training Object Detection Neural Networks", arXiv:1902.04103. Each picture has a share of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._boxes import NONE, rows_of, with_rows
from suanli.training.augments._sampling import (
    check_number,
    class_shares,
    mix_shares,
    partners,
    per_image,
    symmetric_beta,
    uniform,
)

VISIBLE = 0.25  # the part of a picture from which its objects can be found


@dataclass(frozen=True, kw_only=True)
class Mixup(Augmentation):
    """Shares come from Beta(alpha, alpha); a picture is blended with `probability`. Boxes are there for objects of
    which at least a quarter is left."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = frozenset({"class", "boxes"})
    neighbours: ClassVar[int] = 2

    alpha: float = 0.2
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0.01, 100)
        check_number(self, "probability", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        own_part = symmetric_beta(batch, self.alpha, generator)
        own_part = torch.where(uniform(batch, 0, 1, generator) < self.probability, own_part, 1.0)
        partner = partners(batch)
        mixed = batch.with_input("image", torch.lerp(x[partner], x, per_image(own_part, x)))
        if (rows := rows_of(batch)) is not None:
            mixed = with_rows(mixed, torch.cat([_visible(rows, own_part), _visible(rows[partner], 1 - own_part)], 1))
        if "class" not in batch.targets:
            return mixed
        own = class_shares(batch)
        return replace(mixed, targets={**mixed.targets, "class": mix_shares(own, own[partner], own_part)})


def _visible(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Rows (B, N, 6) of pictures of which this part (B,) is left: of too little of it, none are boxes."""
    flags = torch.where((part >= VISIBLE)[:, None], rows[..., 5], NONE)
    return torch.cat([rows[..., :5], flags[..., None]], 2)


AUGMENT = Mixup
