"""Images for networks without batch norms, from scratch: `alexnet`, `convnext`, `vit`, `vit_tiny`.

A smaller learning rate, a longer warm-up and clipped gradients keep them from diverging; they need more
epochs than the others.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import NORMLESS, trains_other_network


def suits(traits: Traits) -> int | None:
    return 50 if trains_other_network(traits) and traits.model in NORMLESS else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="photos_normless",
        model="vit_tiny",
        augment=("resized_crop(scale=(0.35, 1.0))", "flip"),
        epochs=30,
        batch_size=128,
        optimizer="adamw",
        lr=3e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=2,
        task_args={"label_smoothing": 0.1},
        clip_norm=1.0,
    ),
    suits=suits,
)
