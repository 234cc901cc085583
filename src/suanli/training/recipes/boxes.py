"""Images with boxes, from nothing."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._boxes import BOXES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and not traits.weights else None


RECIPE = RecipeChoice(recipe=Recipe(**BOXES.model_dump() | {"name": "boxes"}), suits=suits)
