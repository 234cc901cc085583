"""Images with a number each, for a network that the user names. AdamW with clipped
gradients assumes the least about its structure; its rates are those of the recipes for classes."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import ANY


def suits(traits: Traits) -> int | None:
    return 40 if traits.kind == "image" and not traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **ANY.model_dump()
        | {
            "name": "image_values_any",
            "task": "regression",
            "task_args": {"loss_function": "huber"},
        }
    ),
    suits=suits,
)
