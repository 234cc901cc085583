"""Progressive resizing: the first part of a training sees smaller pictures, which cost less and teach nearly as much.

A step at 20 px costs 0.4 times one at 32 px. The last part sees pictures at full size, so that filters and batch
statistics end up fit for what validation and prediction see. Shrinking comes after the augmentations, which keep
their meaning in pixels.

Source: J. Howard, "Training Imagenet in 3 hours for USD 25; and CIFAR10 for USD 0.26" (2018),
https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

SMALLEST = 16  # px; smaller pictures are left as they are


def scale_at(stages: Sequence[tuple[float, float]], step: int, steps: int) -> float:
    """What each side is multiplied by at `step` (from 0) of `steps`; `stages` are pairs of a share of the steps
    and the scale until there, in ascending order; then comes 1."""
    return next((factor for until, factor in stages if step < round(until * steps)), 1.0)


def full_size_steps(stages: Sequence[tuple[float, float]], first: int, end: int, steps: int) -> float:
    """Of the steps from `first` to before `end`, each counted by its share of the pixels at full size."""
    total, begun = 0.0, first
    for until, factor in (*stages, (math.inf, 1.0)):
        ended = end if until == math.inf else min(end, round(until * steps))
        total += max(0, ended - begun) * factor**2
        begun = max(begun, ended)
    return total


def shrink_side(pixels: int, scale: float) -> int:
    return min(pixels, max(SMALLEST, round(pixels * scale)))


def shrink(images: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, C, H, W) to (B, C, shrink_side(H), shrink_side(W)), bilinear with antialiasing."""
    height, width = images.shape[2:]
    wanted = shrink_side(height, scale), shrink_side(width, scale)
    if wanted == (height, width):
        return images
    return F.interpolate(images, size=wanted, mode="bilinear", antialias=True)
