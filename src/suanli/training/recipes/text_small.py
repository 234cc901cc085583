"""Text classification from random weights, for fewer than 20,000 texts.

As `text`, with smaller batches and more epochs: a few thousand texts would otherwise give a few dozen steps, too few to
move rare words from their random start.
"""

from __future__ import annotations

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._text import TEXT

MOST_EXAMPLES = 20_000


def suits(traits: Traits) -> int | None:
    return 20 if traits.kind == "text" and traits.examples < MOST_EXAMPLES else None


RECIPE = RecipeChoice(
    recipe=Recipe(**TEXT.model_dump() | {"name": "text_small", "epochs": 8, "batch_size": 64}), suits=suits
)
