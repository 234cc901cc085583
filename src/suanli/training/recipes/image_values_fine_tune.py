"""Small images with a number each, for a network that starts from weights: as `fine_tune`, without augmentations."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **FINE_TUNE.model_dump()
        | {"name": "image_values_fine_tune", "task": "regression", "task_args": {"loss_function": "huber"}}
    ),
    suits=suits,
)
