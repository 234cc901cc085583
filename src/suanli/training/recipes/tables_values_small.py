"""Fewer than 6,000 rows of a table with a number to each: smaller batches, and more epochs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._tables import SMALL_ROWS, TABLES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "table" and traits.annotation == "value" and traits.examples < SMALL_ROWS else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **TABLES.model_dump() | {"name": "tables_values_small", "task": "regression", "batch_size": 64, "epochs": 40}
    ),
    suits=suits,
)
