"""The sizes of the images that a training sees.

Progressive resizing: training begins on smaller images, which cost less and teach nearly as much. A step at 20 px costs
0.4 times one at 32 px. The last part of a run sees full-size images, so that filters and batch statistics fit what
validation and prediction see. Source: J. Howard, "Training Imagenet in 3 hours for USD 25; and CIFAR10 for USD 0.26"
(2018), https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html.

Mixed sizes: each step draws its size, full size among them, so that a network learns to see objects at the scales that
it meets later. Networks fit the apparent sizes that they were trained on: Touvron et al., "Fixing the train-test
resolution discrepancy", arXiv:1906.06423.

Images are shrunk after the augmentations, whose settings in pixels keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from suanli.core.types import Batch, Recipe
from suanli.data.loader import mix

SMALLEST = 16  # px; smaller images are left as they are


def scale_at(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of each side at `step` (from 0), where the recipe's own epochs have `steps`."""
    if recipe.mixed_sizes:
        return _drawn_scale(recipe.mixed_sizes, recipe.seed, step)
    stages = recipe.progressive_resizing
    return next((factor for until, factor in stages if step < round(until * steps)), 1.0)


def _drawn_scale(sizes: Sequence[float], seed: int, step: int) -> float:
    """As many consecutive steps as there are sizes see each of them once, in a random order."""
    every = (1.0, *sizes)
    turn, place = divmod(step, len(every))
    return sorted(every, key=lambda size: mix(seed, 4, turn, every.index(size)))[place]


def full_size_steps(recipe: Recipe, first: int, end: int, steps: int) -> float:
    """The work of the steps from `first` to before `end`, where a step counts by its share of the full-size pixels."""
    if recipe.mixed_sizes:
        return _mixed_steps(recipe, first, end)
    total, begin = 0.0, first
    for until, factor in (*recipe.progressive_resizing, (math.inf, 1.0)):
        stop = end if until == math.inf else min(end, round(until * steps))
        total += max(0, stop - begin) * factor**2
        begin = max(begin, stop)
    return total


def _mixed_steps(recipe: Recipe, first: int, end: int) -> float:
    every = (1.0, *recipe.mixed_sizes)
    begin, stop = -(-first // len(every)), end // len(every)  # whole turns, which have each size once
    if begin >= stop:
        return sum(scale_at(recipe, step, 0) ** 2 for step in range(first, end))
    edges = (*range(first, begin * len(every)), *range(stop * len(every), end))
    return (stop - begin) * sum(size**2 for size in every) + sum(scale_at(recipe, step, 0) ** 2 for step in edges)


def smallest_scale(recipe: Recipe) -> float:
    """Of any step."""
    return min([1.0, *recipe.mixed_sizes, *(factor for _, factor in recipe.progressive_resizing)])


def shrink_side(pixels: int, scale: float) -> int:
    """In pixels. Sides don't shrink below SMALLEST."""
    return min(pixels, max(SMALLEST, round(pixels * scale)))


def shrink(batch: Batch, scale: float) -> Batch:
    """With images (B, C, shrink_side(H), shrink_side(W)), bilinear with antialiasing, and boxes that follow them."""
    images = batch.inputs["image"]
    height, width = images.shape[2:]
    size = shrink_side(height, scale), shrink_side(width, scale)
    if size == (height, width):
        return batch
    batch = batch.with_input("image", F.interpolate(images, size=size, mode="bilinear", antialias=True))
    if (boxes := batch.targets.get("boxes")) is None:
        return batch
    down, right = size[0] / height, size[1] / width
    factors = torch.tensor([right, down, right, down, 1, 1], dtype=boxes.dtype, device=boxes.device)
    return replace(batch, targets={**batch.targets, "boxes": boxes * factors})
