"""Images with a number each: `speednet` from scratch, for a network of any other name see `image_values_any`.

No augmentation: many a number changes when a picture is mirrored, enlarged or moved. Optimizer and loss were chosen on
validation data with one seed: the angle by which pictures of CIFAR-10 were turned, the value of handwritten digits, the
direction of light on faces, and the number of cells in a picture.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import LONG


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and not traits.weights and traits.model in (None, "speednet") else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **LONG.model_dump()
        | {
            "name": "image_values",
            "task": "regression",
            "task_args": {"loss_function": "huber"},
        }
    ),
    suits=suits,
)
