"""Photos with a number each, for a network that starts from trained weights: as `frozen`, without augmentations."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FROZEN, is_small


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and not is_small(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **FROZEN.model_dump()
        | {
            "name": "image_values_frozen",
            "task": "regression",
            "task_args": {"loss_function": "huber"},
            "augment": (),
            "frozen_views": 1,
        }
    ),
    suits=suits,
)
