"""Rows of a table with classes."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._tables import SMALL_ROWS, TABLES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "table" and traits.annotation == "class" and traits.examples >= SMALL_ROWS else None


RECIPE = RecipeChoice(
    recipe=Recipe(**TABLES.model_dump() | {"name": "tables"}),
    suits=suits,
)
