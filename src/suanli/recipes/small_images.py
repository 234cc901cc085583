"""Small colour images, many of them: `speednet` for a handful of epochs.

Chosen on 5,000 training images of CIFAR-10 that took no part in training.
"""

from suanli.recipes._images import SMALL, for_speednet, is_few, is_sign
from suanli.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 60 if for_speednet(traits) and not is_few(traits) and not is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **SMALL.model_dump() | {"name": "small_images", "augment": ("crop(padding=2)", "flip(mode='alternate')")}
    ),
    suits=suits,
)
