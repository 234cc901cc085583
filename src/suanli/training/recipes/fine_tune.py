"""Small images, for a network that starts from trained weights: first the head on frozen features, then all layers with
small steps, for the backbone a tenth of the head's."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE, IMAGENET, shows_signs


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and not shows_signs(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **FINE_TUNE.model_dump() | {"name": "fine_tune", "augment": ("resized_crop(scale=(0.5, 1.0))", "flip")}
    ),
    suits=suits,
    weights=IMAGENET,
)
