"""Texts with several labels each, from random weights: as `text_small`, for any number of texts."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._text import TEXT


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "text" else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **TEXT.model_dump()
        | {"name": "text_labels", "task": "multilabel", "task_args": {}, "epochs": 8, "batch_size": 64}
    ),
    suits=suits,
)
