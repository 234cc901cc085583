"""Fewer than 6,000 rows of a table with classes: smaller batches, and more epochs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._tables import SMALL_ROWS, TABLES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "table" and traits.annotation == "class" and traits.examples < SMALL_ROWS else None


RECIPE = RecipeChoice(
    recipe=Recipe(**TABLES.model_dump() | {"name": "tables_small", "batch_size": 64, "epochs": 40}),
    suits=suits,
)
