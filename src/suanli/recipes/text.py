"""Text classification from random weights, for tens of thousands of short texts and more, on a CPU.

Words are learned by heart within two passes, so nearly everything here works against that: word
dropout, dropout on embeddings and features, label smoothing, a moving average of the weights, few
epochs. Embeddings have no weight decay: it would pull rare words, which seldom see a gradient, to zero.
"""

from __future__ import annotations

from suanli.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 10 if traits.kind == "text" else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="text",
        model="text_cnn",
        preprocess={"vocabulary_size": 20_000, "min_count": 2, "lowercase": True},
        augment=("word_dropout(p=0.3)",),
        epochs=3,
        batch_size=256,
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
