"""Photos with several labels each, for a network that starts from trained weights: as `frozen`."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FROZEN, IMAGENET, is_small


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and not is_small(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(**FROZEN.model_dump() | {"name": "image_labels_frozen", "task": "multilabel"}),
    suits=suits,
    weights=IMAGENET,
)
