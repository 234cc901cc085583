"""Text classification from random weights, for tens of thousands of short texts and more, on a CPU.

Words are learned by heart within two passes, so nearly everything here works against that: word
dropout, dropout on embeddings and features, label smoothing, a moving average of the weights, few
epochs. Embeddings have no weight decay: it would pull rare words, which seldom see a gradient, to zero.
"""

from __future__ import annotations

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._text import TEXT


def suits(traits: Traits) -> int | None:
    return 10 if traits.kind == "text" else None


RECIPE = RecipeChoice(recipe=Recipe(**TEXT.model_dump() | {"name": "text"}), suits=suits)
