"""Small grey images, many of them: as `small_images`, but never mirrored, since grey small images are
mostly digits, letters and other signs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, for_speednet, is_few, is_sign


def suits(traits: Traits) -> int | None:
    return 60 if for_speednet(traits) and not is_few(traits) and is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(**SMALL.model_dump() | {"name": "small_images_grey", "augment": ("crop(padding=2)",)}),
    suits=suits,
)
