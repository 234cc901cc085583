"""Text classification from random weights, for fewer than 20,000 texts.

As `text`, with smaller batches and more passes: a few thousand texts would otherwise end after some
dozens of steps, before rare words have moved from their random start.
"""

from __future__ import annotations

from suanli.types import Recipe, RecipeChoice, Traits

MOST_EXAMPLES = 20_000


def suits(traits: Traits) -> int | None:
    return 20 if traits.kind == "text" and traits.examples < MOST_EXAMPLES else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="text_small",
        model="text_cnn",
        preprocess={"vocabulary_size": 20_000, "min_count": 2, "lowercase": True},
        augment=("word_dropout(p=0.3)",),
        epochs=8,
        batch_size=64,
        optimizer="adamw",
        lr=2e-3,
        schedule="cosine",
        warmup_epochs=0.2,
        label_smoothing=0.1,
        clip_norm=1.0,
        ema_decay=0.99,
    ),
    suits=suits,
)
