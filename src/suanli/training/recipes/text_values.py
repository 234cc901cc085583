"""Texts with a number each, from random weights.

Less against overfitting than for classes: a number says more about a text than its class. Chosen on validation data
with one seed: the length of a translation, and prices of diamonds and houses by their descriptions.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._text import TEXT


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "text" else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **TEXT.model_dump()
        | {
            "name": "text_values",
            "task": "regression",
            "task_args": {"loss_function": "huber"},
            "model_args": {"dropout": 0.1, "embedding_dropout": 0.0},
            "augment": (),
            "epochs": 8,
            "batch_size": 64,
            "lr": 5e-3,
        }
    ),
    suits=suits,
)
