"""The learning rate over time, as a factor from 0 to 1 of the recipe's rate."""

from __future__ import annotations

import math

from suanli.core.types import Recipe


def lr_factor(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The factor at `step` (from 0) of `steps`.

    It rises linearly over the warm-up, then stays ("constant") or falls to 0 after the last step: linearly ("linear",
    "one_cycle") or along half a cosine ("cosine", Loshchilov & Hutter 2017). "one_cycle" (Smith & Topin 2018) warms
    up over 30 % of the run unless the recipe sets warmup_epochs.
    """
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps - 1)
    if recipe.schedule == "one_cycle" and recipe.warmup_epochs == 0:
        warmup = round(0.3 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(steps - warmup, 1)
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share
