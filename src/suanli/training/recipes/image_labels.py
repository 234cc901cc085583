"""Small images with several labels each: `speednet` from scratch. Optimizer and rates are those of the recipes for
classes. Never mirrored, since small images may show signs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import LONG, trains_speednet


def suits(traits: Traits) -> int | None:
    return 50 if trains_speednet(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **LONG.model_dump()
        | {
            "name": "image_labels",
            "task": "multilabel",
            "augment": ("crop(fraction=0.0625)",),
        }
    ),
    suits=suits,
)
