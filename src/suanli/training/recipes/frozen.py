"""Photos, for a network that starts from trained weights: the head alone, fitted to features of the frozen backbone.

With `--epochs` or enough `--time-budget`, all layers are trained from there, as in `fine_tune`.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FROZEN, IMAGENET, is_small


def suits(traits: Traits) -> int | None:
    return 70 if traits.kind == "image" and traits.weights and not is_small(traits) else None


RECIPE = RecipeChoice(recipe=Recipe(**FROZEN.model_dump() | {"name": "frozen"}), suits=suits, weights=IMAGENET)
