"""Small images with several labels each, for a network that starts from weights: as `fine_tune`."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE, IMAGENET


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **FINE_TUNE.model_dump()
        | {
            "name": "image_labels_fine_tune",
            "task": "multilabel",
            "task_args": {},
            "augment": ("resized_crop(scale=(0.5, 1.0))", "flip"),
        }
    ),
    suits=suits,
    weights=IMAGENET,
)
