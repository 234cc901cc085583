"""Pastes a box from another picture of the batch; the target becomes shares of both classes, by area.

Source: S. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features", ICCV 2019. Each picture has a box of its own, and the shares follow from the pixels that it really
covers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import check_number, class_shares, mix_shares, partners, symmetric_beta, uniform


@dataclass(frozen=True, kw_only=True)
class Cutmix(Augmentation):
    """The kept area comes from Beta(alpha, alpha); a picture is changed with `probability`."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = frozenset({"class"})
    neighbours: ClassVar[int] = 2

    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0.01, 100)
        check_number(self, "probability", 0, 1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x = batch.inputs["image"]
        height, width = x.shape[2:]
        side = torch.sqrt(1 - symmetric_beta(batch, self.alpha, generator))
        changed = uniform(batch, 0, 1, generator) < self.probability
        side = torch.where(changed, side, 0.0)
        rows = _interval(side * height, height, batch, generator)
        columns = _interval(side * width, width, batch, generator)
        partner = partners(batch)
        pasted = rows[:, None, :, None] & columns[:, None, None, :]
        own_part = 1 - rows.sum(1) * columns.sum(1) / (height * width)
        own = class_shares(batch)
        mixed = batch.with_input("image", torch.where(pasted, x[partner], x))
        return replace(mixed, targets={**batch.targets, "class": mix_shares(own, own[partner], own_part)})


def _interval(side: torch.Tensor, length: int, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """(B,) sides in pixels to (B, length) bool: an interval with a random centre, cut off at the ends."""
    centre = uniform(batch, 0, length, generator)
    pixels = torch.arange(length, device=side.device) + 0.5
    return (pixels - centre[:, None]).abs() < side[:, None] / 2


AUGMENT = Cutmix
