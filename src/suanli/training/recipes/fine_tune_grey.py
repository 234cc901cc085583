"""Small grey images, for a network that starts from trained weights: as `fine_tune`, but never mirrored."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE, IMAGENET, shows_signs


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and shows_signs(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(**FINE_TUNE.model_dump() | {"name": "fine_tune_grey", "augment": ("crop(fraction=0.0625)",)}),
    suits=suits,
    weights=IMAGENET,
)
