"""Text classification from random weights, for tens of thousands of short texts and more, on a CPU.

A network memorises the texts within two epochs, so most settings are against overfitting: word dropout, dropout on
embeddings and features, label smoothing, a moving average of the weights, few epochs. Embeddings have no weight decay:
it would pull rare words, which seldom get a gradient, to 0.
"""

from __future__ import annotations

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._text import TEXT


def suits(traits: Traits) -> int | None:
    return 10 if traits.kind == "text" else None


RECIPE = RecipeChoice(recipe=Recipe(**TEXT.model_dump() | {"name": "text"}), suits=suits)
