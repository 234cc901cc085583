"""Progressive resizing: training begins on smaller pictures, which cost less and teach nearly as much.

A step at 20 px costs 0.4 times one at 32 px. The last part of a run sees full-size pictures, so that filters and
batch statistics fit what validation and prediction see. Pictures are shrunk after the augmentations, whose settings in
pixels keep their meaning.

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
    """The factor of each side at `step` (from 0) of `steps`. `stages` are pairs, in ascending order: a share of the
    steps, and the scale until there. After the last stage the scale is 1."""
    return next((factor for until, factor in stages if step < round(until * steps)), 1.0)


def full_size_steps(stages: Sequence[tuple[float, float]], first: int, end: int, steps: int) -> float:
    """The work of the steps from `first` to before `end`, where a step counts by its share of the full-size pixels."""
    total, begin = 0.0, first
    for until, factor in (*stages, (math.inf, 1.0)):
        stop = end if until == math.inf else min(end, round(until * steps))
        total += max(0, stop - begin) * factor**2
        begin = max(begin, stop)
    return total


def shrink_side(pixels: int, scale: float) -> int:
    """In pixels. Sides don't shrink below SMALLEST."""
    return min(pixels, max(SMALLEST, round(pixels * scale)))


def shrink(images: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, C, H, W) to (B, C, shrink_side(H), shrink_side(W)), bilinear with antialiasing."""
    height, width = images.shape[2:]
    size = shrink_side(height, scale), shrink_side(width, scale)
    if size == (height, width):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
