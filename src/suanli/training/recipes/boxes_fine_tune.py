"""Images with boxes, for a network whose backbone starts from weights."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._boxes import BOXES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(**BOXES.model_dump() | {"name": "boxes_fine_tune", "backbone_lr_scale": 0.3}),
    suits=suits,
)
