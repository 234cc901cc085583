"""Blends each picture with another of the batch; its target becomes shares of both classes.

Source: H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Each picture has
a share of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import (
    check_number,
    class_shares,
    mix_shares,
    partners,
    per_image,
    symmetric_beta,
    uniform,
)


@dataclass(frozen=True, kw_only=True)
class Mixup(Augmentation):
    """Shares come from Beta(alpha, alpha); a picture is blended with `probability`."""

    input: ClassVar[str] = "image"
    keeps: ClassVar[frozenset[str]] = frozenset({"class"})
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
        own = class_shares(batch)
        mixed = batch.with_input("image", torch.lerp(x[partner], x, per_image(own_part, x)))
        return replace(mixed, targets={**batch.targets, "class": mix_shares(own, own[partner], own_part)})


AUGMENT = Mixup
