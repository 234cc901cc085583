"""Images with several labels each, for a network that starts from trained weights: as `fine_tune`, larger crops."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import FINE_TUNE


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
)
