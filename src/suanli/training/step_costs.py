"""What each step of a training sees and trains, and what it costs: pure functions of the number of the step.

A cost of 1 is a step on full-size images that trains all layers. Steps on smaller images cost their share of the
pixels. A step that trains no layer below the head costs the forward pass, and each further layer an equal part of the
rest. That is about right for transformers; in most convolutional networks the layers next to the input, which are
unfrozen last, take the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from suanli.core.types import Recipe
from suanli.training.image_sizes import full_size_steps, scale_at

FORWARD = 1 / 3  # of the time of a step, about


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    recipe: Recipe
    steps: int  # of the recipe's own epochs; more follow in a continuation
    steps_per_epoch: int
    layers: int  # below the head

    @property
    def _unfreezing_steps(self) -> int:
        return round(self.recipe.unfreeze_epochs * self.steps_per_epoch)

    def unfrozen_layers(self, step: int) -> int:
        """How many layers below the head are trained at `step` (from 0): none at first, all after
        `unfreeze_epochs`."""
        steps = self._unfreezing_steps
        return self.layers if step >= steps else step * self.layers // steps

    def image_scale(self, step: int) -> float:
        """What the recipe multiplies each side of the images by. A continuation doesn't begin with small ones again."""
        return scale_at(self.recipe, step, self.steps)

    def cost(self, step: int) -> float:
        """Of one step."""
        return self.image_scale(step) ** 2 * self._trained_share(step)

    def total(self, first: int, end: int) -> float:
        """Of the steps from `first` to before `end`."""
        changes = {-(-self._unfreezing_steps * layer // self.layers) for layer in range(1, self.layers + 1)}
        bounds = [first, *sorted(step for step in changes if first < step < end), end]
        return sum(full_size_steps(self.recipe, a, b, self.steps) * self._trained_share(a) for a, b in pairwise(bounds))

    def equal_steps(self, first: int, end: int) -> int:
        """How many steps from `first` on, all before `end`, cost the same."""
        others = (step for step in range(first, end) if self.cost(step) != self.cost(first))
        return next(others, end) - first

    def _trained_share(self, step: int) -> float:
        if not self.layers:
            return 1.0
        return FORWARD + (1 - FORWARD) * self.unfrozen_layers(step) / self.layers
