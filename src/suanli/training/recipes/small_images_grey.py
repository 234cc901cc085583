"""Small grey images, at least 10,000: as `small_images`, but never mirrored, since they are mostly digits, letters and
other signs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, has_few_examples, shows_signs, trains_speednet


def suits(traits: Traits) -> int | None:
    return 60 if trains_speednet(traits) and not has_few_examples(traits) and shows_signs(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(**SMALL.model_dump() | {"name": "small_images_grey", "augment": ("crop(padding=2)",)}),
    suits=suits,
)
