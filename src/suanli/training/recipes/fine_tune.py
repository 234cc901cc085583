"""Images for a network that starts from given weights: small steps, the backbone's a tenth of the head's."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE, is_sign


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and not is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **FINE_TUNE.model_dump() | {"name": "fine_tune", "augment": ("resized_crop(scale=(0.5, 1.0))", "flip")}
    ),
    suits=suits,
)
