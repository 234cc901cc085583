"""Images with several labels each, from scratch, for photos and for a network that the user names. AdamW with clipped
gradients assumes the least about its structure. Crops keep at least half of an image, so that its labels still hold."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import ANY, trains_other_network


def suits(traits: Traits) -> int | None:
    return 50 if trains_other_network(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **ANY.model_dump()
        | {
            "name": "image_labels_any",
            "task": "multilabel",
            "augment": ("resized_crop(scale=(0.5, 1.0))", "flip"),
        }
    ),
    suits=suits,
)
